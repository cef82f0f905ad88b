// d_bias = dS on tensor cores (mma.sync), summed over the axes that bias broadcasts, sm_80 and newer, 16 bits.
//
//   S = Q K^T,  P = e^(S - lse),  dP = dO V^T,  dS = P o (dP - delta)
//
// A block owns a tile of d_bias, kBlockM x kBlockN, and walks over what that is the sum of: batches, heads, tiles of
// queries and of keys. Where no axis is summed it owns tiles side by side and walks over these. S, dP and sums stay in
// registers. A turn's copies have half a turn to arrive; Q and dO, or K and V, are copied only where they change:
//
//   wait, barrier | copy dO, V | S = Q K^T | wait, barrier | copy next Q, K | P | dP = dO V^T | dS | sum or store
//
// A sum of n float32 terms in a register is rounded by about 2^-24 sqrt(n) of itself, where each term comes of operands
// that were rounded to 2^-9 or 2^-12; sums over a tile's rows and keys, and over chunks, are float64.
#include "cuda/backward_bias.cuh"
#include "cuda/mma_scores.cuh"

enum { kEnoughStrips = 1024 }; // blocks that fill a GPU a few times

struct BiasPlace { // of a block: its tile of d_bias; how many heads, row and key tiles are summed; its last turn
    int batch, head, m_tile, n_tile, sum_h, sum_m, sum_n, group, end;
    bool new_rows, new_keys;                          // in the next turn: others than in this one
    int64_t stride_q, stride_k, stride_v, stride_d_o; // of rows
};

template <typename Element_, int kDim_, int kRowWarps_, int kColWarps_, int kMTiles_, int kBlockN_, int kBlocksPerSm_>
struct BiasTile {
    using Element = Element_;
    static constexpr int kDim = kDim_, kRowWarps = kRowWarps_, kColWarps = kColWarps_, kMTiles = kMTiles_;
    static constexpr int kBlockN = kBlockN_, kBlocksPerSm = kBlocksPerSm_;
    static constexpr int kWarpRows = 16 * kMTiles, kBlockM = kRowWarps * kWarpRows, kWarpKeys = kBlockN / kColWarps;
    static constexpr int kThreads = 32 * kRowWarps * kColWarps;
    static_assert(kWarpKeys % 16 == 0, "keep_masks takes 16 x 16 entries");
    struct Tiles {
        SwizzledTile<Element, kBlockM, kDim> q, d_o;
        SwizzledTile<Element, kBlockN, kDim> k, v;
    };
    struct Sums {
        float entry[kBlockM][kBlockN + 1];
        double column[kBlockN];
    };
    struct Smem {
        union {
            Tiles tiles;
            Sums sums; // at the end
        };
        BiasPlace place; // kept here, as the rule of this turn's head, where they take no registers
        MmaScoreRule rule;
    };
};

// Blocks that share a tile of d_bias, or, where no axis is summed, a row of tiles, of which each owns `strip`.
struct BiasOrder {
    int parts, strip;
};

struct Turn { // a tile of dS
    int b, h, row0, key0;
};

// A thread's rows of the values of a head.
template <int kMTiles>
__device__ __forceinline__ void load_rows(float (&x)[kMTiles][2], int thread_row, int len_q, const float *values,
                                          float beyond) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = thread_row + 16 * i + 8 * half;
            x[i][half] = row < len_q ? values[row] : beyond;
        }
}

// A warp's tile to global memory, as many of its rows and keys as are left. at: its first element's, in t.
template <typename Element, int kMTiles, int kNTiles>
__device__ __forceinline__ void store_tile(const fa_bias &t, int64_t at, const float (&acc)[kMTiles][kNTiles][4],
                                           int64_t rows, int64_t keys) {
    const int lane = threadIdx.x % 32, bytes = static_cast<int>(fa_dtype_bytes(t.dtype));
    char *const first = static_cast<char *>(t.data) + at * bytes;
    const bool is_odd = lane % 2;
    const bool vectors = t.stride_k == 1 && keys >= 8 * kNTiles &&
                         (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(t.stride_q * bytes)) % 8 == 0;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * i + 8 * half + lane / 4;
            char *const row_at = first + row * t.stride_q * bytes;
#pragma unroll
            for (int j = 0; j < kNTiles; j += 2) {
                const float *left = acc[i][j] + 2 * half, *right = acc[i][j + 1] + 2 * half;
                if (vectors && t.dtype == kDtype<Element>) {
                    // Two neighbours exchange a pair: each has four elements side by side, a row's four lanes 32 bytes.
                    const uint32_t low = Mma<Element>::round_pair(left[0], left[1]);
                    const uint32_t high = Mma<Element>::round_pair(right[0], right[1]);
                    const uint32_t other = __shfl_xor_sync(~0u, is_odd ? low : high, 1);
                    const int key = 8 * (j + is_odd) + lane % 4 / 2 * 4;
                    if (row < rows)
                        *reinterpret_cast<uint2 *>(row_at + key * bytes) =
                            is_odd ? make_uint2(other, high) : make_uint2(low, other);
                } else if (vectors && t.dtype == FA_FLOAT32) {
                    float2 *to = reinterpret_cast<float2 *>(row_at) + (4 * j + lane % 4);
                    if (row < rows) to[0] = make_float2(left[0], left[1]), to[4] = make_float2(right[0], right[1]);
                } else {
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const int key = 8 * (j + n / 2) + lane % 4 * 2 + n % 2;
                        if (row < rows && key < keys)
                            store(t.data, t.dtype, at + row * t.stride_q + key * t.stride_k,
                                  (n < 2 ? left : right)[n % 2]);
                    }
                }
            }
        }
}

// kSums: an axis of d_bias is summed.
template <typename T, bool kSums>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    tensor_core_backward_bias(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan,
                              const __grid_constant__ BiasOrder order, const __grid_constant__ MmaScorePlan scores) {
    using Element = typename T::Element;
    using M = Mma<Element>;
    constexpr int kMTiles = T::kMTiles, kNTiles = T::kWarpKeys / 8;
    extern __shared__ __align__(1024) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);
    auto &tiles = smem.tiles;

    const fa_forward_args &forward = args.forward;
    const BiasShape shape(args, T::kBlockM, T::kBlockN);
    const auto part_of = [&] { return static_cast<int>(blockIdx.x) % order.parts; };
    if (threadIdx.x == 0) {
        const int m_tiles = static_cast<int>(shape.m_tiles), n_tiles = static_cast<int>(shape.n_tiles);
        const int tile = static_cast<int>(blockIdx.x) / order.parts, row_of_tiles = kSums ? tile / n_tiles : tile;
        const int heads = static_cast<int>(shape.sizes[1]), head = row_of_tiles / m_tiles;
        BiasPlace &to = smem.place;
        to.batch = head / heads, to.head = head % heads;
        to.m_tile = m_tiles - 1 - row_of_tiles % m_tiles; // causal: the longest rows first
        to.n_tile = kSums ? tile % n_tiles : part_of() * order.strip;
        to.sum_h = static_cast<int>(shape.sums[1]), to.sum_m = static_cast<int>(shape.sums[2]);
        to.sum_n = static_cast<int>(shape.sums[3]);
        to.group = static_cast<int>(forward.heads_q / forward.heads_kv);
        to.end = kSums ? static_cast<int>((part_of() + 1) * shape.terms() / order.parts)
                       : min(order.strip, n_tiles - to.n_tile);
        to.stride_q = forward.q.stride_l, to.stride_k = forward.k.stride_l, to.stride_v = forward.v.stride_l;
        to.stride_d_o = args.d_o.stride_l;
        to.new_rows = to.new_keys = true;
    }
    __syncthreads(); // the place is there
    const BiasPlace &place = smem.place;

    // Along an axis that is summed the tile's own index is 0, along the others the term's.
    const auto turn_at = [&](int index) {
        if (!kSums)
            return Turn{place.batch, place.head, place.m_tile * T::kBlockM, (place.n_tile + index) * T::kBlockN};
        const int bhm = index / place.sum_n, bh = bhm / place.sum_m;
        return Turn{bh / place.sum_h + place.batch, bh % place.sum_h + place.head,
                    (bhm % place.sum_m + place.m_tile) * T::kBlockM, (index % place.sum_n + place.n_tile) * T::kBlockN};
    };
    const auto keys_of = [&](const fa_sequence &seq, int row) {
        const fa_interval keys = fa_visible_keys(&forward, &seq, row);
        return Span{static_cast<int>(keys.lo), static_cast<int>(keys.hi)};
    };
    const auto next_visible = [&](int index) {
        for (; index < place.end; ++index) {
            const Turn turn = turn_at(index);
            const fa_sequence seq = fa_sequence_at(&forward, turn.b);
            const int row_end = static_cast<int>(fa_min(turn.row0 + T::kBlockM, seq.len_q));
            if (turn.row0 < row_end && turn.key0 < keys_of(seq, row_end - 1).hi &&
                turn.key0 + T::kBlockN > keys_of(seq, turn.row0).lo)
                break;
        }
        return index;
    };

    using RowCopy = TileCopy<T::kThreads, decltype(tiles.q)>;
    using KeyCopy = TileCopy<T::kThreads, decltype(tiles.k)>;
    const auto head_of = [&](const fa_tensor &t, const fa_sequence &seq, int h, int64_t row, int64_t width) {
        return Rows<float>(t, kDtype<Element>, seq.batch_index, h, row, width).data;
    };
    const auto copy_q = [&](const Turn &turn) {
        const fa_sequence seq = fa_sequence_at(&forward, turn.b);
        RowCopy(head_of(forward.q, seq, turn.h, seq.row_q, forward.head_dim), place.stride_q, forward.head_dim,
                turn.row0, static_cast<int>(seq.len_q))
            .all(tiles.q);
    };
    const auto copy_d_o = [&](const Turn &turn) {
        const fa_sequence seq = fa_sequence_at(&forward, turn.b);
        const float *blind = blind_rows(plan, row_values<float>(forward, seq, plan, turn.b, turn.h));
        RowCopy(head_of(args.d_o, seq, turn.h, seq.row_q, forward.head_dim_v), place.stride_d_o, forward.head_dim_v,
                turn.row0, static_cast<int>(seq.len_q))
            .all(tiles.d_o, blind ? blind + turn.row0 : nullptr);
    };
    const auto copy_keys = [&](const fa_tensor &t, int64_t stride, int64_t width, const Turn &turn, auto &to) {
        const fa_sequence seq = fa_sequence_at(&forward, turn.b);
        KeyCopy(head_of(t, seq, turn.h / place.group, seq.row_k, width), stride, width, turn.key0,
                static_cast<int>(seq.len_k))
            .all(to);
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp % T::kRowWarps * T::kWarpRows, warp_key = warp / T::kRowWarps * T::kWarpKeys;
    const auto place_rows = M::place_a(tiles.q, warp_row);
    const auto place_keys = M::place_b(tiles.k, warp_key);
    // acc = dropout(acc) - delta. What that needs is made here: it would take registers all along.
    const auto subtract_delta = [&](float (&acc)[kMTiles][kNTiles][4], const Turn &turn) {
        const fa_sequence seq = fa_sequence_at(&forward, turn.b);
        const int row0 = turn.row0 + warp_row, key0 = turn.key0 + warp_key;
        float delta[kMTiles][2], keep = 1;
        load_rows(delta, row0 + lane / 4, static_cast<int>(seq.len_q),
                  row_values<float>(forward, seq, plan, turn.b, turn.h).delta, 0.0f);
        if (forward.dropout_p > 0) {
            keep = static_cast<float>(1 / (1 - forward.dropout_p));
#pragma unroll
            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                for (int j = 0; j < kNTiles; j += 2) {
                    uint32_t masks[1][4]; // of a pair of entries
                    keep_masks(masks, scores, smem.rule, row0 + 16 * i, key0 + 8 * j);
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const uint32_t kept = masks[0][n / 2] & (n % 2 ? 0xFFFF0000u : 0x0000FFFFu);
                        float &x = acc[i][j + n / 4][n % 4];
                        x = kept ? x : 0;
                    }
                }
        }
        each_entry<false, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) {
            acc[i][j][entry] = fmaf(acc[i][j][entry], keep, -delta[i][entry / 2]);
        });
    };
    const auto store_turn = [&](const float (&acc)[kMTiles][kNTiles][4], int index) { // of the tiles side by side
        const int64_t row = place.m_tile * T::kBlockM + warp_row, key = (place.n_tile + index) * T::kBlockN + warp_key;
        const fa_bias &t = args.d_bias;
        const int64_t head_at = place.batch * t.stride_b + place.head * t.stride_h;
        store_tile<Element>(t, head_at + row * t.stride_q + key * t.stride_k, acc, shape.sizes[2] - row,
                            shape.sizes[3] - key);
    };

    const int begin = kSums ? static_cast<int>(part_of() * shape.terms() / order.parts) : 0;
    int next = next_visible(begin);
    if (next < place.end) {
        const Turn turn = turn_at(next);
        copy_q(turn);
        copy_keys(forward.k, place.stride_k, forward.head_dim, turn, tiles.k);
    }
    cp_async_commit();

    float sum[kSums ? kMTiles : 1][kSums ? kNTiles : 1][4] = {};
    for (int index = kSums ? next : begin; index < place.end; index = kSums ? next : index + 1) {
        float acc_dp[kMTiles][kNTiles][4] = {}; // dS in the end
        if (index == next) {
            const Turn turn = turn_at(index);
            cp_async_wait<0>();
            __syncthreads(); // Q and K are there; dO, V and the rule of the turn before were read
            if (place.new_rows) {
                if (threadIdx.x == 0)
                    smem.rule = MmaScoreRule(forward, fa_sequence_at(&forward, turn.b), turn.b, turn.h);
                copy_d_o(turn);
            }
            if (place.new_keys) copy_keys(forward.v, place.stride_v, forward.head_dim_v, turn, tiles.v);
            cp_async_commit();

            const fa_sequence seq = fa_sequence_at(&forward, turn.b);
            const int row0 = turn.row0 + warp_row, key0 = turn.key0 + warp_key, len_q = static_cast<int>(seq.len_q);
            const int thread_row = row0 + lane / 4, thread_key = key0 + lane % 4 * 2;
            // The keys that the first and the last of the warp's rows see.
            const Span first = keys_of(seq, row0), last = keys_of(seq, min(row0 + T::kWarpRows, len_q) - 1);
            const bool sees = row0 < len_q && key0 < last.hi && key0 + T::kWarpKeys > first.lo;
            const bool whole = last.lo <= key0 && key0 + T::kWarpKeys <= first.hi;
            const RowValues<float> of_row = row_values<float>(forward, seq, plan, turn.b, turn.h);
            float lse[kMTiles][2], correction[kMTiles][2];
            load_rows(lse, thread_row, len_q, of_row.lse, infinity(0.0f));
            load_rows(correction, thread_row, len_q, of_row.correction, 0.0f);

            float acc_s[kMTiles][kNTiles][4] = {};
            if (sees) multiply_rows<T::kDim>(acc_s, place_rows, place_keys);
            cp_async_wait<0>();
            __syncthreads(); // dO, V and the rule are there; Q and K were read
            next = next_visible(index + 1);
            if (next < place.end) {
                const Turn after = turn_at(next);
                const bool new_rows = after.b != turn.b || after.h != turn.h || after.row0 != turn.row0;
                const bool new_keys =
                    after.b != turn.b || after.h / place.group != turn.h / place.group || after.key0 != turn.key0;
                if (threadIdx.x == 0) smem.place.new_rows = new_rows, smem.place.new_keys = new_keys;
                if (new_rows) copy_q(after);
                if (new_keys) copy_keys(forward.k, place.stride_k, forward.head_dim, after, tiles.k);
            }
            cp_async_commit();

            if (sees) {
                using NoTile = SwizzledTile<Element, T::kBlockM, T::kBlockN>;
                modify_scores<kAnyFeature, Element, false>(
                    acc_s, forward, seq, scores, smem.rule, thread_row, thread_key, [](int, int, int, float) {},
                    StagedBias<NoTile>{false, nullptr, 0, 0});
                if (!whole) hide_scores<false>(acc_s, forward, seq, thread_row, thread_key);
                each_entry<false, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) { // P; scores' unit is 1
                    float &s = acc_s[i][j][entry];
                    s = ex2_approx(fmaf(s - lse[i][entry / 2], 1.44269504f, -1.44269504f * correction[i][entry / 2]));
                });
                auto place_d_o = place_rows;
                auto place_v = place_keys;
                place_d_o.address += sizeof tiles.q, place_v.address += sizeof tiles.k;
                multiply_rows<T::kDim>(acc_dp, place_d_o, place_v);
                subtract_delta(acc_dp, turn_at(index));
                each_entry<false, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) {
                    if constexpr (kSums)
                        sum[i][j][entry] = fmaf(acc_s[i][j][entry], acc_dp[i][j][entry], sum[i][j][entry]);
                    else
                        acc_dp[i][j][entry] *= acc_s[i][j][entry];
                });
            }
        }
        if constexpr (!kSums) store_turn(acc_dp, index);
    }
    cp_async_wait<0>(); // no copy outlives its block

    if constexpr (kSums) {
        const bool sums_rows = args.d_bias.stride_q == 0, sums_keys = args.d_bias.stride_k == 0;
        if (!sums_rows && !sums_keys && !plan.bias_sums) return store_turn(sum, 0);
        auto &sums = smem.sums;
        __syncthreads(); // the last tiles were read: the sums take their place
        each_entry<false, kMTiles, kNTiles>([&](int row, int key, int i, int j, int entry) {
            sums.entry[warp_row + lane / 4 + row][warp_key + lane % 4 * 2 + key] = sum[i][j][entry];
        });
        __syncthreads(); // they are there
        for (int key = threadIdx.x; sums_rows && key < T::kBlockN; key += T::kThreads) {
            double column = 0;
            for (int row = 0; row < T::kBlockM; ++row) column += static_cast<double>(sums.entry[row][key]);
            sums.column[key] = column;
        }
        __syncthreads(); // rows are added up
        const int row0 = place.m_tile * T::kBlockM, key0 = place.n_tile * T::kBlockN;
        const int left_rows = static_cast<int>(fa_min(T::kBlockM, shape.sizes[2] - row0)); // 1 where they are summed
        const int left_keys = static_cast<int>(fa_min(T::kBlockN, shape.sizes[3] - key0));
        for (int i = threadIdx.x; i < left_rows * left_keys; i += T::kThreads) {
            const int row = i / left_keys, key = i % left_keys;
            double total = 0;
            for (int n = key; n < (sums_keys ? T::kBlockN : key + 1); ++n)
                total += sums_rows ? sums.column[n] : static_cast<double>(sums.entry[row][n]);
            const int64_t head = place.batch * shape.sizes[1] + place.head;
            if (plan.bias_sums)
                plan.bias_sums[part_of() * shape.elements() + (head * shape.sizes[2] + row0 + row) * shape.sizes[3] +
                               key0 + key] = total;
            else
                shape.put(args.d_bias, (head * shape.sizes[2] + row0 + row) * shape.sizes[3] + key0 + key, total);
        }
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, bool kSums>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    const BiasShape shape(*args, T::kBlockM, T::kBlockN);
    FA_REQUIRE(shape.terms() <= INT32_MAX, FA_ERROR_UNSUPPORTED, "d_bias sums %lld tiles, at most 2^31 - 1 are allowed",
               static_cast<long long>(shape.terms()));
    const int64_t rows_of_tiles = shape.sizes[0] * shape.sizes[1] * shape.m_tiles;
    const int64_t wanted = fa_clamp(fa_ceil_div(kEnoughStrips, fa_max(rows_of_tiles, 1)), 1, fa_max(shape.n_tiles, 1));
    const int64_t strip = fa_max(fa_ceil_div(shape.n_tiles, wanted), 1);
    const int64_t parts = kSums ? plan.bias_chunks : fa_ceil_div(shape.n_tiles, strip);
    const BiasOrder order = {static_cast<int>(parts), static_cast<int>(strip)};
    return fa_launch("tensor core backward, d_bias", tensor_core_backward_bias<T, kSums>,
                     rows_of_tiles * (kSums ? shape.n_tiles : 1) * parts, T::kThreads, sizeof(typename T::Smem),
                     fa_stream(&args->forward), *args, plan, order, MmaScorePlan(args->forward));
}

// Launches a tile that holds the rows and that the device has the shared memory for; false: neither.
template <typename T, bool kSums>
static bool try_tile(const fa_backward_args *args, const BackwardPlan &plan, fa_status *status) {
    if (fa_max(args->forward.head_dim, args->forward.head_dim_v) > T::kDim) return false;
    const void *kernel = reinterpret_cast<const void *>(tensor_core_backward_bias<T, kSums>);
    if (!fa_allow_shared(kernel, sizeof(typename T::Smem))) return false;
    *status = launch<T, kSums>(args, plan);
    return true;
}

// Rows of Q, dO, K and V in shared memory, two blocks an SM where it holds both: one computes while the other waits.
template <typename Element, bool kSums>
static fa_status by_head_dim(const fa_backward_args *args, const BackwardPlan &plan) {
    fa_status status = FA_OK;
    // clang-format off
    //                         dim, row warps, column warps, m tiles, keys, blocks an SM
    if (try_tile<BiasTile<Element,  64, 4, 1, 2, 64, 2>, kSums>(args, plan, &status) ||
        try_tile<BiasTile<Element, 128, 4, 1, 2, 64, 2>, kSums>(args, plan, &status) ||
        try_tile<BiasTile<Element, 256, 4, 2, 2, 64, 1>, kSums>(args, plan, &status) ||
        try_tile<BiasTile<Element, 256, 2, 2, 2, 32, 1>, kSums>(args, plan, &status)) // 99 KiB a block
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core backward: no tile of d_bias fits the device's shared memory");
}

template <typename Element>
static fa_status by_sums(const fa_backward_args *args, const BackwardPlan &plan) {
    const fa_bias &t = args->d_bias;
    if (t.stride_b && t.stride_h && t.stride_q && t.stride_k) return by_head_dim<Element, false>(args, plan);
    FA_CHECK((by_head_dim<Element, true>(args, plan)));
    return fa_backward_add_bias_chunks(args, plan);
}

fa_status fa_tensor_core_backward_bias(const fa_backward_args *args, const BackwardPlan &plan) {
    return args->forward.dtype == FA_FLOAT16 ? by_sums<__half>(args, plan) : by_sums<__nv_bfloat16>(args, plan);
}
