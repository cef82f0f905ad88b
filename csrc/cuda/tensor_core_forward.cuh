// FlashAttention forward on tensor cores (mma.sync), sm_80 and newer.
//
//   S = Q K^T,  m' = max(m, rowmax S),  P = e^(S - m'),  l = e^(m - m') l + rowsum P,  O = e^(m - m') O + P V
//   o = O / l,  lse = m + ln l                                             Dao, FlashAttention-2 (2023), algorithm 1
//
// A block takes kBlockM rows of Q of one head and walks over the keys that they see, kBlockN at a time. A row warp owns 16
// kMTiles of the rows; P stays in its registers. While a turn computes, the copies of the next one's V and K are under way:
//
//   wait, barrier | S = Q K^T, between its products: load V, K of the next turn
//                 | mask | max | P of 16 keys | O += P V of these 16 | P of the next 16 | O += ...
//
// The exponentials of 16 keys are independent of the product over the 16 before: they run under it. m follows the
// maximum only when that grows by more than 2^kSlack: until then P is at most 2^kSlack times larger, which costs no precision
// of a floating-point number, and O is not rescaled.
//
// Rows of more than 128 elements do not fit a warp's registers with the 32 rows that reading K and V from shared memory
// needs to keep up with the tensor cores. There two warps share their rows (kColWarps = 2): each makes the scores of half of the keys,
// they exchange P through shared memory, and each makes every other 16 columns of O. Where K and V have one stage (kStages = 1)
// turns of twice the keys fit: V is loaded under S, the next turn's K under O, and the block meets in the middle of a turn.
//
// Float32 multiplies as pairs of tf32 and adds up O in float32, 16 keys at a time (mma_float.cuh).
#ifndef FA_TENSOR_CORE_FORWARD_CUH
#define FA_TENSOR_CORE_FORWARD_CUH

#include "cuda/tensor_core_forward_store.cuh"

constexpr float kSlack = 8;
constexpr float kFar = 1 << 20; // a float32 of this size is rounded by 2^-4

template <typename T, unsigned kFeatures>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    tensor_core_forward(const __grid_constant__ fa_forward_args args, const __grid_constant__ ForwardPlan plan) {
    using M = Mma<typename T::Element>;
    constexpr bool kModified = kFeatures != kProducts, kHasBias = kFeatures & kBias;
    constexpr int kMTiles = T::kMTiles, kNTiles = T::kWarpKeys / 8, kOTiles = T::kWarpDim / 8;
    constexpr int kParts = 16 / M::kDepth;
    constexpr bool kFloat = kDtype<typename T::Element> == FA_FLOAT32;
    static_assert(!kFloat || (T::kColWarps == 1 && !T::kKeepsQ), "float32: rows of one warp, Q in shared memory");
    static_assert(T::kStages == 2 || T::kColWarps == 2, "one stage: what a pair exchanges, too, waits for the block");
    extern __shared__ __align__(1024) unsigned char shared[];
    using Smem = typename T::template Smem<kModified>;
    Smem &smem = *reinterpret_cast<Smem *>(shared);

    const int nth_section = plan.section_blocks.quotient(static_cast<int>(blockIdx.x));
    const int in_section = static_cast<int>(blockIdx.x - nth_section * plan.section_blocks.value);
    const int nth_m = plan.section.quotient(in_section), section = static_cast<int>(plan.section.value);
    const int bh = nth_section * section + in_section - nth_m * section;
    if (bh >= plan.heads) return;
    const int b = plan.heads_q.quotient(bh), h = bh - b * static_cast<int>(plan.heads_q.value);
    const int h_kv = plan.group.quotient(h);
    const int row0 = (plan.m_blocks - 1 - nth_m) * T::kBlockM; // causal: the longest rows first
    const fa_sequence seq = fa_sequence_at(&args, b);
    const int len_q = static_cast<int>(seq.len_q);
    if (row0 >= len_q) return;
    const int row_end = min(row0 + T::kBlockM, len_q);
    const Rows<float> q(args.q, kDtype<typename T::Element>, seq.batch_index, h, seq.row_q, args.head_dim);
    const Rows<float> k(args.k, kDtype<typename T::Element>, seq.batch_index, h_kv, seq.row_k, args.head_dim);
    const Rows<float> v(args.v, kDtype<typename T::Element>, seq.batch_index, h_kv, seq.row_k, args.head_dim_v);
    TileCopy<T::kThreads, decltype(smem.q)>(q.data, args.q.stride_l, args.head_dim, row0, row_end).all(smem.q);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Warps that share rows belong to different schedulers: those of one need not do the same at the same time.
    const int row_warp = warp / T::kColWarps, col_warp = warp % T::kColWarps;
    const int warp_row0 = row0 + row_warp * T::kWarpRows;
    // Lanes 0 and 1 look at what the block's first and last row see, 2 and 3 at what the warp's do.
    const int asked_row = lane % 2 ? (lane & 2 ? warp_row0 + T::kWarpRows : row_end) - 1 : lane & 2 ? warp_row0 : row0;
    const fa_interval asked = fa_visible_keys(&args, &seq, min(asked_row, row_end - 1));
    const int asked_lo = static_cast<int>(asked.lo), asked_hi = static_cast<int>(asked.hi);
    const int key_first = __shfl_sync(~0u, asked_lo, 0) / T::kBlockN * T::kBlockN;
    const int key_end = __shfl_sync(~0u, asked_hi, 1);
    using KeyCopy = TileCopy<T::kThreads, std::remove_reference_t<decltype(smem.k[0])>,
                             !kModified && !kFloat && T::kDim == 128 ? 2 : 1>; // more would cost registers, or time
    const auto copy_of = [&](const fa_tensor &t, const char *head, int64_t width, int n0) {
        return KeyCopy(head, t.stride_l, width, n0, key_end);
    };
    copy_of(args.k, k.data, args.head_dim, key_first).all(smem.k[0]);
    if (T::kStages == 2) copy_of(args.v, v.data, args.head_dim_v, key_first).all(smem.v[0]);

    // The keys that one of the warp's rows sees, and those that all of them do.
    const Span some = {__shfl_sync(~0u, asked_lo, 2), __shfl_sync(~0u, asked_hi, 3)};
    const Span all = {__shfl_sync(~0u, asked_lo, 3), __shfl_sync(~0u, asked_hi, 2)};
    if (lane == 0) smem.keys[warp] = {{some.lo, warp_row0 < row_end ? some.hi : 0}, all};
    if (threadIdx.x == 0) {
        smem.seq = seq, smem.head_k = k.data, smem.head_v = v.data;
        smem.row0 = row0, smem.row_end = row_end, smem.head = h;
        if constexpr (kModified) smem.rule = MmaScoreRule(args, seq, b, h);
    }
    const float natural = kModified ? plan.scores.unit : static_cast<float>(args.softmax_scale); // a score of 1
    const float unit = 1.44269504f * natural;
    const auto staged_bias = [&] { // this warp's part, of a turn
        return StagedBias<typename T::BiasTile>{kFeatures == kBias || plan.stages_bias, &smem.bias(),
                                                row_warp * T::kWarpRows, col_warp * T::kWarpKeys};
    };
    const auto copy_bias = [&](int64_t head_at, int block_row0, int block_row_end, int n0) {
        if (staged_bias().is_there)
            staged_bias().template copy<T::kWarpRows, T::kWarpKeys>(args.bias, head_at,
                                                                    block_row0 + row_warp * T::kWarpRows, block_row_end,
                                                                    n0 + col_warp * T::kWarpKeys, key_end);
    };
    const auto copy_next_bias = [&](int n0) {
        if constexpr (kHasBias) copy_bias(smem.rule.bias_at, smem.row0, smem.row_end, n0);
    };

    float acc_o[kMTiles][kOTiles][4] = {};
    float row_max[kMTiles][2], row_sum[kMTiles][2] = {}; // of this thread's columns
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) row_max[i][0] = row_max[i][1] = -infinity(0.0f);
    // Whether an m of the warp is so large that rounding its product with unit would move P by powers of 2: scores are then
    // made relative to it first.
    bool is_far = false;

    if constexpr (kHasBias) copy_bias(b * args.bias.stride_b + h * args.bias.stride_h, row0, row_end, key_first);
    cp_async_commit();

    const auto place_q = M::place_a(smem.q, row_warp * T::kWarpRows);
    auto place_k = M::place_b(smem.k[0], col_warp * T::kWarpKeys);
    auto place_v = M::place_b_transposed(smem.v[0], 0, 2 * col_warp);
    typename M::A kept_q[T::kKeepsQ ? kMTiles : 1][T::kDim / M::kDepth];

    __syncthreads(); // what the threads tell each other is there
    for (int n0 = key_first, stage = 0; n0 < key_end; n0 += T::kBlockN, stage ^= 1) {
        const auto keys = smem.keys[warp];
        const bool is_seen = n0 < keys.some.hi && n0 + T::kBlockN > keys.some.lo;
        // V goes out between the products of S, and the next turn's K, where a pair shares rows and S takes most of what
        // shared memory gives, between the first of O. V is the next turn's, too, or with one stage this one's. Zeros after
        // the last turn.
        const auto copy_k = [&] { return copy_of(args.k, smem.head_k, args.head_dim, n0 + T::kBlockN); };
        auto &next_k = smem.k[T::kStages == 2 ? stage ^ 1 : 0], &next_v = smem.v[T::kStages == 2 ? stage ^ 1 : 0];
        KeyCopy copy = copy_of(args.v, smem.head_v, args.head_dim_v, T::kStages == 2 ? n0 + T::kBlockN : n0);
        cp_async_wait<0>();
        __syncthreads(); // K, and V with two stages, are there, and what the copies take the place of was read
        if constexpr (T::kKeepsQ) {
            if (n0 == key_first)
#pragma unroll
                for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                    for (int d = 0; d < T::kDim; d += M::kDepth)
                        M::load_a(kept_q[i][d / M::kDepth], place_q, 16 * i, d);
        }
        if (!is_seen) {
            // As many barriers as the warps that see keys: racecheck counts them, and a pair waits for nobody else here.
#pragma unroll
            for (int n = 0; n < (T::kColWarps == 2 ? T::kStages : 0); ++n) barrier_wait(1 + row_warp, 64);
            copy.all(next_v);
            if constexpr (T::kStages == 1) {
                cp_async_commit();
                cp_async_wait<0>();
                __syncthreads(); // with the warps that see keys
            }
            copy_k().all(next_k);
            copy_next_bias(n0 + T::kBlockN);
        } else {
            const auto copy_parts = [&](int step, int steps) {
                constexpr int kCopies = (3 - T::kColWarps) * KeyCopy::kCopies,
                              kGroup = kFloat || T::kColWarps == 2 ? 8 : 16;
                constexpr int kFirst = kGroup == 16; // behind the first products
                constexpr int kGroups = (kCopies + kGroup - 1) / kGroup;
#pragma unroll
                for (int n = 0; n < kCopies; ++n)
                    if (n / kGroup * steps / kGroups + kFirst == step) {
                        if (n == KeyCopy::kCopies) copy = copy_k();
                        copy.part(n < KeyCopy::kCopies ? next_v : next_k, n % KeyCopy::kCopies);
                    }
            };
            float acc_s[kMTiles][kNTiles][4] = {};
            if constexpr (kFloat) {
                multiply_rows<T::kDim>(acc_s, place_q, place_k,
                                       [&](int d) { copy_parts(d / M::kDepth, T::kDim / M::kDepth); });
            } else {
                // 16 keys of a part of the depth are a step; operands are loaded a step ahead.
                constexpr int kKeySteps = T::kWarpKeys / 16, kSteps = T::kDim / M::kDepth * kKeySteps;
                static_assert(kSteps > 1 && (T::kColWarps == 1 || KeyCopy::kCopies % 8 == 0), "all copies are issued");
                typename M::A a[2][kMTiles];
                typename M::B key[2][2];
                const auto load_q = [&](int d_step, int i) {
                    if constexpr (T::kKeepsQ)
                        a[d_step % 2][i] = kept_q[i][d_step];
                    else
                        M::load_a(a[d_step % 2][i], place_q, 16 * i, d_step * M::kDepth);
                };
                const auto load_keys = [&](int step) {
                    M::load_b(key[step % 2], place_k, step / kKeySteps * M::kDepth, step % kKeySteps * 16);
                };
#pragma unroll
                for (int i = 0; i < kMTiles; ++i) load_q(0, i);
                load_keys(0);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const int d_step = step / kKeySteps, n = step % kKeySteps;
                    if (step + 1 < kSteps) load_keys(step + 1);
                    if (d_step + 1 < T::kDim / M::kDepth)
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i)
                            if (i * kKeySteps / kMTiles == n) load_q(d_step + 1, i);
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i)
                            M::multiply(acc_s[i][2 * n + j], a[d_step % 2][i], key[step % 2][j]);
                    copy_parts(step, kSteps);
                }
            }

            const int warp_n0 = n0 + col_warp * T::kWarpKeys;
            const int thread_key = warp_n0 + lane % 4 * 2;
            const auto warp_row = [&] { return smem.row0 + row_warp * T::kWarpRows; };
            if constexpr (kModified) {
                modify_scores<kFeatures, typename T::Element, false>(
                    acc_s, args, smem.seq, plan.scores, smem.rule, warp_row() + lane / 4, thread_key,
                    [](int, int, int, float) {}, staged_bias());
            }
            if (n0 < keys.all.lo || n0 + T::kBlockN > keys.all.hi)
                hide_scores<false>(acc_s, args, smem.seq, warp_row() + lane / 4, thread_key);

            // Whether a row's maximum left the slack behind.
            float new_max[kMTiles][2];
            bool grew = false;
#pragma unroll
            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float most = -infinity(0.0f);
#pragma unroll
                    for (int j = 0; j < kNTiles; ++j)
                        most = fmaxf(most, fmaxf(acc_s[i][j][2 * half], acc_s[i][j][2 * half + 1]));
                    new_max[i][half] = most;
                    grew |= (most - row_max[i][half]) * unit > kSlack;
                }
            grew = __any_sync(~0u, grew);
            // Each row's m and what hangs on it follow its maximum; most(i, half): of this turn.
            const auto follow = [&](const auto &most_of) {
                bool reaches_far = false;
                const bool was_far = is_far;
                const auto scale_row = [&](int i, int half, float log2) {
                    const float factor = ex2_approx(log2);
                    row_sum[i][half] *= factor;
#pragma unroll
                    for (int j = 0; j < kOTiles; ++j)
                        acc_o[i][j][2 * half] *= factor, acc_o[i][j][2 * half + 1] *= factor;
                };
#pragma unroll
                for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float before = row_max[i][half], most = fmaxf(most_of(i, half), before);
                        row_max[i][half] = most;
                        const float shift = product(most, unit), old_shift = product(before, unit);
                        // P before is 2^old_shift's, rounded, while that is near; P from now on shift's, or of the
                        // product itself.
                        float log2 = (before - most) * unit;
                        if (!was_far && fabsf(shift) < kFar) log2 = old_shift - shift;
                        if (!was_far && !(fabsf(shift) < kFar) && before != -infinity(0.0f))
                            log2 -= fmaf(before, unit, -old_shift);
                        scale_row(i, half, most == -infinity(0.0f) ? 0.0f : log2);
                        reaches_far |= most != -infinity(0.0f) && !(fabsf(most * unit) < kFar);
                    }
                is_far = is_far || __any_sync(~0u, reaches_far);
                if (!is_far) return;
#pragma unroll
                for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float most = row_max[i][half] == -infinity(0.0f) ? 0.0f : row_max[i][half];
                        const float shift = product(most, unit);
                        if (!was_far && fabsf(shift) < kFar) // from now on it is not rounded
                            scale_row(i, half, -fmaf(most, unit, -shift));
#pragma unroll
                        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                            for (int e = 2 * half; e < 2 * half + 2; ++e)
                                acc_s[i][j][e] = (acc_s[i][j][e] - most) * unit;
                    }
            };
            if constexpr (T::kColWarps == 1) {
                if (grew || is_far) follow([&](int i, int half) { return row_max_of<4>(new_max[i][half]); });
            } else {
                // The pair's other warp has the other keys of the row.
                auto &mine = smem.exchange.of_row[col_warp];
                const int row = row_warp * T::kWarpRows + lane / 4;
                grew = grew || is_far;
                if (lane == 0) smem.exchange.grew[row_warp][col_warp] = grew;
                if (grew)
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            new_max[i][half] = row_max_of<4>(new_max[i][half]);
                            if (lane % 4 == 0) mine[row + 16 * i + 8 * half] = new_max[i][half];
                        }
                barrier_wait(1 + row_warp, 64); // both maxima are there; P of the turn before was read
                const bool other_grew = smem.exchange.grew[row_warp][1 - col_warp];
                if (grew || other_grew)
                    follow([&](int i, int half) {
                        const float most = grew ? new_max[i][half] : -infinity(0.0f);
                        return other_grew ? fmaxf(most, smem.exchange.of_row[1 - col_warp][row + 16 * i + 8 * half])
                                          : most;
                    });
            }
            const float unit_now = is_far ? 1.0f : unit;
            float shift[kMTiles][2];
#pragma unroll
            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) // no key yet: 2^(-inf - 0) = 0
                    shift[i][half] =
                        is_far || row_max[i][half] == -infinity(0.0f) ? 0.0f : product(row_max[i][half], unit);
            // P of 16 keys, as the A of M::kDepth each.
            const auto probabilities = [&](const bool drops, typename M::A(&p)[kMTiles][kParts], int step) {
                uint32_t kept[kMTiles][4];
                if constexpr (kModified)
                    if (drops) keep_masks(kept, plan.scores, smem.rule, warp_row(), warp_n0 + 16 * step);
#pragma unroll
                for (int i = 0; i < kMTiles; ++i) {
                    float (&left)[4] = acc_s[i][2 * step], (&right)[4] = acc_s[i][2 * step + 1];
#pragma unroll
                    for (int entry = 0; entry < 8; ++entry) {
                        float &s = entry < 4 ? left[entry] : right[entry - 4];
                        s = ex2_approx(fmaf(s, unit_now, -shift[i][entry / 2 % 2]));
                        row_sum[i][entry / 2 % 2] += s;
                        if constexpr (kModified && kFloat)
                            if (drops && !(kept[i][entry / 2] & (entry % 2 ? 0x80000000 : 0x8000))) s = 0;
                    }
                    M::from_scores(p[i], left, right);
                    if constexpr (kModified && !kFloat) {
#pragma unroll
                        for (int word = 0; word < 4; ++word)
                            if (drops) p[i][0].x[word] &= kept[i][word];
                    }
                }
            };
            const auto after_values = [&](int step) {
                if constexpr (T::kColWarps == 2) {
                    if (step == 0) copy = copy_k();
#pragma unroll
                    for (int n = 0; n < KeyCopy::kCopies; ++n)
                        if (n / 8 * (T::kBlockN / 32) / (KeyCopy::kCopies / 8) == step) copy.part(next_k, n);
                }
                if constexpr (kHasBias)
                    if (step == 1) {  // registers of scores are free
                        __syncwarp(); // the bias was read
                        copy_next_bias(n0 + T::kBlockN);
                    }
            };
            const auto multiply_values = [&](const bool drops) {
                constexpr int kSteps = T::kWarpKeys / 16;
                if constexpr (T::kColWarps == 1) {
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        typename M::A p[kMTiles][kParts];
                        probabilities(drops, p, step);
                        add_product(acc_o, p, place_v, 16 * step);
                        after_values(step);
                    }
                } else {
                    const int row = row_warp * T::kWarpRows + lane / 4;
                    auto &tile = smem.exchange.p;
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        typename M::A p[kMTiles][kParts];
                        probabilities(drops, p, step);
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                            for (int n = 0; n < 4; ++n) {
                                auto *at = tile.at(row + 16 * i + n % 2 * 8,
                                                   (col_warp * T::kWarpKeys + 16 * step) / 8 + n / 2);
                                store_shared(shared_address(at) + lane % 4 * 4, p[i][0].x[n]);
                            }
                    }
                    if constexpr (T::kStages == 2) {
                        barrier_wait(1 + row_warp, 64); // P is there
                    } else {
                        cp_async_commit();
                        cp_async_wait<0>();
                        __syncthreads(); // V and P are there, K was read
                    }
                    const auto place_p = M::place_a(tile, row_warp * T::kWarpRows);
#pragma unroll
                    for (int step = 0; step < T::kBlockN / 16; ++step) {
                        typename M::A p[kMTiles][kParts];
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i) M::load_a(p[i][0], place_p, 16 * i, 16 * step);
                        add_product<T::kColWarps>(acc_o, p, place_v, 16 * step);
                        after_values(step);
                    }
                }
            };
            if (meets<kFeatures, kDropout>(plan.scores.drops))
                multiply_values(true);
            else
                multiply_values(false);
        }
        cp_async_commit();
        if constexpr (T::kStages == 2) {
            const int stage_bytes = stage ? -static_cast<int>(sizeof smem.k[0]) : static_cast<int>(sizeof smem.k[0]);
            place_k.address += stage_bytes, place_v.address += stage_bytes;
        }
    }
    cp_async_wait<0>();
    __syncthreads(); // no copy is under way, Q was read: O takes its place

    store_rows<T, kModified>(smem, args, plan, acc_o, row_max, row_sum, unit, is_far);
}

#endif
