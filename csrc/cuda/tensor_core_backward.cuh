// FlashAttention backward on tensor cores (mma.sync), sm_80 and newer.
//
//   P = e^(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P o (dP - delta),  dK = scale dS^T Q,  dQ = scale dS K
//                                                                          Dao, FlashAttention-2 (2023), algorithm 2
//
// A block owns kBlockN keys of one key/value head and walks over the rows of its query heads that see them, kBlockM at a
// time. Its warps come in pairs that share 32 keys: a value warp makes S^T, P^T and dV, a key warp dP^T, dS^T and dK, so
// that 32 rows of either gradient fit a warp's registers, and each fragment of Q and dO that is read serves two
// products. P^T goes to the key warp through shared memory; dS^T lies there for dQ, which all warps make together, a turn later:
//
//   value warp  | barrier, load the next Q, dO | S^T = K Q^T    | P^T -> pair | dV += P^T dO       | dQ' += dS K of the turn before
//   key warp    |                              | dQ' += dS K of | dP^T = V dO^T | dS^T -> smem | dK += dS^T Q
//                                                the turn before
//
// dQ' are float32 sums in memory. The blocks of keys add to a block of queries in the order of their keys, each
// waiting for the one before: the same bits on every run. They walk from the last rows to the first, one
// turn behind each other, so that waiting costs a few turns at the start of a launch, as many as a head has blocks at a
// time on the device.
//
// A bias alone is copied to shared memory a turn ahead, and dS^T, a turn later, stored as its gradient, too, where no axis is
// summed (else tensor_core_backward_bias.cu makes both products again).
//
// Rows of more than 128 elements: two pairs share 32 keys (kHalves = 2). Each pair makes S and dP of half of the
// queries, and half of the columns of dV and dK; P^T and dS^T pass between them, too.
//
// Float32 multiplies as pairs of tf32 and adds up in float32, 16 queries or keys at a time (mma_float.cuh); P^T, dS^T and
// the softcap's slopes pass between warps in float32.
#ifndef FA_TENSOR_CORE_BACKWARD_CUH
#define FA_TENSOR_CORE_BACKWARD_CUH

#include "cuda/ptx/sync.cuh"
#include "cuda/tensor_core_backward_tile.cuh"

constexpr float kLog2E = 1.44269504f;

template <typename T, unsigned kFeatures>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    tensor_core_backward(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan,
                         const __grid_constant__ QueryGradient dq, const __grid_constant__ BackwardOrder order,
                         const __grid_constant__ MmaScorePlan scores) {
    using Element = typename T::Element;
    using M = Mma<Element>;
    constexpr int kMTiles = T::kMTiles, kNTiles = T::kWarpQueries / 8, kOTiles = T::kWarpDim / 8;
    constexpr int kParts = 16 / M::kDepth;
    constexpr bool kFloat = T::kFloat, kModified = kFeatures != kProducts, kIsAny = kFeatures == kAnyFeature;
    constexpr bool kCaps = kFeatures & kSoftcap, kDrops = kFeatures & kDropout;
    static_assert(!kFloat || T::kHalves == 1, "float32: keys of one pair");
    extern __shared__ __align__(1024) unsigned char shared[];
    auto &smem = *reinterpret_cast<typename T::template Smem<kFeatures> *>(shared);

    const fa_forward_args &forward = args.forward;
    const unsigned in_section = blockIdx.x % (order.section * order.n_blocks);
    const unsigned section0 = blockIdx.x / (order.section * order.n_blocks) * order.section;
    const unsigned section = min(order.section, order.heads - section0);
    const int bh = static_cast<int>(section0 + in_section % section), group = order.group;
    const int b = warp_uniform(bh / order.heads_kv), h_kv = warp_uniform(bh % order.heads_kv);
    const int n_block = warp_uniform(static_cast<int>(in_section / section)), key0 = n_block * T::kBlockN;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    const int len_q = warp_uniform(static_cast<int>(seq.len_q)), len_k = warp_uniform(static_cast<int>(seq.len_k));
    if (key0 >= len_k) return;

    const auto head_of = [&](const fa_tensor &t, int64_t head, int64_t row) {
        return static_cast<const char *>(t.data) + fa_row_offset(&t, seq.batch_index, head, row) * sizeof(Element);
    };
    using KeyCopy = TileCopy<T::kThreads, decltype(smem.k)>;
    KeyCopy(head_of(forward.k, h_kv, seq.row_k), forward.k.stride_l, forward.head_dim, key0, len_k).all(smem.k);
    KeyCopy(head_of(forward.v, h_kv, seq.row_k), forward.v.stride_l, forward.head_dim_v, key0, len_k).all(smem.v);

    const int warp = warp_uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const bool makes_dv = warp < T::kWarps / 2; // a value warp
    const int key_warp = warp % T::kKeyWarps, half = warp / T::kKeyWarps % T::kHalves;
    const bool is_far = forward.seqlen_q > 0 && *plan.has_far_rows != 0;
    const float scale = static_cast<float>(forward.softmax_scale);
    const float keep = static_cast<float>(1 / (1 - forward.dropout_p));

    // The turns go from the last rows to the first: all heads of the group at the same rows, so that blocks of later keys,
    // which may have fewer, keep pace with those that they wait for; or, scores that have rules, head by head.
    const int last_key = min(key0 + T::kBlockN, len_k) - 1;
    const fa_interval see_first = fa_seeing_rows(&forward, &seq, key0, key0 + 1);
    const fa_interval see_last = fa_seeing_rows(&forward, &seq, last_key, last_key + 1);
    const int row_lo = static_cast<int>(see_first.lo) / T::kBlockM * T::kBlockM;
    const int row_last = static_cast<int>((see_last.hi - 1) / T::kBlockM) * T::kBlockM;
    const int of_head = see_first.lo < see_last.hi ? (row_last - row_lo) / T::kBlockM + 1 : 0;
    const int turns = warp_uniform(of_head * group);
    const bool keeps_turns = threadIdx.x == T::kThreads - 32;
    const auto turn_at = [&](int turn) -> typename T::Turn & { return smem.turns[static_cast<unsigned>(turn) % 8]; };
    const auto complete = [&](typename T::Turn &turn, const typename T::Walk &walk) {
        const int nth = n_block - max(turn.m0 + walk.edge, 0) / T::kBlockN; // among the blocks that m0 sees
        turn.sum = turn.sum0 + (nth & (dq.chains - 1)), turn.before = nth >> (dq.chains - 1);
        turn.is_whole = (turn.m0 >= walk.whole_lo) & (turn.m0 + T::kBlockM <= walk.whole_hi);
    };
    const auto describe = [&](int turn) {
        if (turn >= turns) return;
        typename T::Turn next = turn_at(turn - 1);
        const typename T::Walk walk = smem.walk;
        const bool is_outer = --next.inner == 0;
        const typename T::Step &step = smem.steps[is_outer];
        if (is_outer) {
            next.inner = walk.inner_turns;
            if constexpr (kModified)
                smem.rules[turn / of_head % 3] = MmaScoreRule(forward, seq, b, h_kv * group + turn / of_head);
        }
        next.q += step.q_bytes, next.d_o += step.d_o_bytes, next.lse += step.lse;
        next.m0 += step.m0, next.sum0 += step.sum0;
        complete(next, walk);
        turn_at(turn) = next;
    };
    using QueryCopy = TileCopy<T::kThreads, std::remove_reference_t<decltype(smem.q[0])>>;
    const auto copy_q = [&](const typename T::Turn &turn) {
        return QueryCopy(turn.q, forward.q.stride_l, forward.head_dim, 0, len_q - turn.m0);
    };
    const auto copy_d_o = [&](const typename T::Turn &turn) {
        return QueryCopy(turn.d_o, args.d_o.stride_l, forward.head_dim_v, 0, len_q - turn.m0);
    };
    const int64_t to_correction = static_cast<float *>(plan.correction) - static_cast<float *>(plan.lse);
    const int64_t to_delta = static_cast<float *>(plan.delta) - static_cast<float *>(plan.lse);
    const auto copy_row_values = [&](const typename T::Turn &turn, int stage) {
        const int i = threadIdx.x % T::kBlockM; // zeros beyond the end, as in Q and dO
        if (threadIdx.x < T::kBlockM) {
            const bool is_row = turn.m0 + i < len_q;
            cp_async_4(&smem.lse[stage][i], turn.lse + i, is_row && (kFloat || !is_far));
            if (kFloat || is_far) cp_async_4(&smem.correction[stage][i], turn.lse + to_correction + i, is_row);
            if (!kFloat && is_far) cp_async_4(&smem.far_lse[stage][i], turn.lse + i, is_row);
        } else if (threadIdx.x < 2 * T::kBlockM) {
            cp_async_4(&smem.delta[stage][i], turn.lse + to_delta + i, turn.m0 + i < len_q);
        }
    };

    // After a barrier that all warps came to since they added.
    const auto tell_added = [&](int turn_index) {
        const typename T::Turn &turn = turn_at(turn_index);
        if (threadIdx.x == T::kThreads / 2) raise_release(dq.turns + turn.sum, turn.before + 1);
    };

    // dQ' += dS K of a turn, after the keys before these.
    const auto add_to_dq = [&](int turn_index) {
        const int query_warp = warp % T::kQueryWarps, column_warp = warp / T::kQueryWarps;
        const auto place_ds =
            M::place_a_transposed(smem.ds[turn_index % 2], 0, query_warp * T::kQueryTiles * M::kColumnsIn16);
        const auto place_k = M::place_b_transposed(
            smem.k, 0, column_warp * (kFloat ? T::kColumnTiles * M::kColumnsIn16 : M::kColumnsIn16));
        const typename T::Turn &turn = turn_at(turn_index);
        const int before = turn.before;
        const int32_t *counter = dq.turns + turn.sum;
        float *sums = dq.sums + static_cast<int64_t>(turn.sum) * (T::kBlockM * T::kDim) +
                      (warp * (T::kQueryTiles * 2 * T::kColumnTiles) * 32 + lane) * 4;
        int added = before > 0 ? load_relaxed(counter) : 0; // asked for ahead
        float acc[T::kQueryTiles][2 * T::kColumnTiles][4] = {};
#pragma unroll
        for (int key = 0; key < T::kBlockN; key += 16) {
            typename M::A a[T::kQueryTiles][kParts];
#pragma unroll
            for (int i = 0; i < T::kQueryTiles; ++i)
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                    M::load_a_transposed(a[i][part], place_ds, 16 * i, key + M::kDepth * part);
            add_product<kFloat ? 1 : T::kColumnWarps>(acc, a, place_k, key);
        }
        // By a key warp, here, where the fence finds the reductions of the turn before done.
        if (!makes_dv && turn_index > 0) tell_added(turn_index - 1);
        const auto each = [&](const auto &body) {
#pragma unroll
            for (int i = 0; i < T::kQueryTiles; ++i)
#pragma unroll
                for (int j = 0; j < 2 * T::kColumnTiles; ++j)
                    body(sums + (i * 2 * T::kColumnTiles + j) * 32 * 4, acc[i][j]);
        };
        if (before == 0) {
            each([](float *at, const float (&x)[4]) {
                *reinterpret_cast<float4 *>(at) = make_float4(x[0], x[1], x[2], x[3]);
            });
            return;
        }
        while (added < before) added = load_relaxed(counter); // the blocks before have added theirs
        each([](float *at, const float (&x)[4]) { reduce_add_4(at, x[0], x[1], x[2], x[3]); });
    };
    // d_bias of a turn, where it is dS: 8 queries a warp, 32 keys at a time.
    const auto store_d_bias = [&](int turn_index) {
        if constexpr (kFeatures == kBias) {
            if (!order.stores_d_bias) return;
            static_assert(T::kBlockM == 8 * T::kWarps);
            const fa_bias &t = args.d_bias;
            const int head = h_kv * group + turn_index / of_head;
            const int row = turn_at(turn_index).m0 + 8 * warp + lane / 4, column = key0 + lane % 4 * 8;
            auto *at = static_cast<Element *>(t.data) + b * t.stride_b + head * t.stride_h + row * t.stride_q + column;
#pragma unroll
            for (int key = 0; key < T::kBlockN; key += 32) {
                uint32_t words[4];
                ldmatrix_4_transposed(words, shared_address(smem.ds[turn_index % 2].at(key + lane, warp)));
                transpose_quads(words);
                if (row < len_q && column + key < forward.seqlen_k)
                    *reinterpret_cast<uint4 *>(at + key) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    };

    // After a barrier that all warps came to since the head's last turn.
    const auto store_slopes = [&](int head_index) {
        if constexpr (kIsAny) {
            if (!plan.slope_sums || threadIdx.x != 0) return;
            double sum = 0;
            for (int w = T::kWarps / 2; w < T::kWarps; ++w) sum += smem.slopes[head_index % 2][w];
            plan.slope_sums[(static_cast<int64_t>(b) * forward.heads_q + h_kv * group + head_index) * order.n_blocks +
                            n_block] = sum;
        }
    };

    const auto staged_bias = [&] { // this warp's part, of a turn
        if constexpr (kFeatures == kBias)
            return StagedBias<typename T::BiasTile>{true, &smem.bias, half * T::kWarpQueries, key_warp * T::kWarpKeys};
        else
            return StagedBias<typename T::BiasTile>{};
    };
    const auto copy_bias = [&](int head_index, int m0) { // by a value warp
        if constexpr (kFeatures == kBias)
            staged_bias().template copy<T::kWarpQueries, T::kWarpKeys>(
                forward.bias, b * forward.bias.stride_b + (h_kv * group + head_index) * forward.bias.stride_h,
                m0 + half * T::kWarpQueries, len_q, key0 + key_warp * T::kWarpKeys, len_k);
    };

    double slope_total = 0;              // of a head, in a key warp: this thread's dS and distances
    float acc[kMTiles][kOTiles][4] = {}; // dV of a value warp, dK of a key warp

    if (turns > 0) {
        const int h = h_kv * group;
        typename T::Turn first;
        first.q = head_of(forward.q, h, seq.row_q + row_last);
        first.d_o = head_of(args.d_o, h, seq.row_q + row_last);
        first.lse = row_values<float>(forward, seq, plan, b, h).lse + row_last;
        first.m0 = row_last;
        copy_q(first).all(smem.q[0]);
        copy_d_o(first).all(smem.d_o[0], plan.has_blind_rows ? first.lse : nullptr);
        copy_row_values(first, 0);
        if (makes_dv) copy_bias(0, row_last);
        if (keeps_turns) {
            const auto step = [&](int heads, int blocks) -> typename T::Step {
                const int rows = -blocks * T::kBlockM;
                const int64_t of_head = forward.cu_seqlens_q ? forward.total_q : forward.seqlen_q;
                return {(heads * forward.q.stride_h + rows * forward.q.stride_l) * int64_t(sizeof(Element)),
                        (heads * args.d_o.stride_h + rows * args.d_o.stride_l) * int64_t(sizeof(Element)),
                        heads * of_head + rows, rows, static_cast<int>(heads * dq.blocks - blocks) * dq.chains};
            };
            const int64_t left = forward.window_left < 0 ? len_k : fa_min(forward.window_left, len_k);
            const bool has_all = key0 + T::kBlockN <= len_k;
            smem.steps[0] = kModified ? step(0, 1) : step(1, 0);
            smem.steps[1] = kModified ? step(1, 1 - of_head) : step(1 - group, 1);
            smem.walk = {kModified ? of_head : group, static_cast<int>(see_last.lo),
                         has_all ? static_cast<int>(see_first.hi) : 0, len_k - len_q - static_cast<int>(left)};
            first.sum0 = static_cast<int>(h * dq.blocks + first_query_block<T::kBlockM>(forward, seq, b) +
                                          row_last / T::kBlockM) *
                         dq.chains;
            first.inner = smem.walk.inner_turns;
            complete(first, smem.walk);
            turn_at(0) = first;
            if constexpr (kModified) smem.rules[0] = MmaScoreRule(forward, seq, b, h);
        }
    }
    for (int turn = 0; turn < turns; ++turn) {
        const int stage = turn % 2;
        if (keeps_turns) describe(turn + 1); // ahead of the barrier: after it, others would wait for its warp
        cp_async_commit();
        cp_async_wait<0>();
        // Q and dO are there, the next turn is described; those of the turn before were read, its dS is there, and dQ' of
        // the one before that.
        __syncthreads();
        if (kIsAny && turn > 0 && turn % of_head == 0) store_slopes(turn / of_head - 1);
        // The next turn's; where there is none, this one's again. All features leave no registers for a copy.
        const int now_m0 = turn_at(turn).m0;
        const bool is_whole = turn_at(turn).is_whole;
        using Next = std::conditional_t<kIsAny, const typename T::Turn &, const typename T::Turn>;
        Next next = turn_at(min(turn + 1, turns - 1));
        copy_row_values(next, stage ^ 1);
        QueryCopy next_q = copy_q(next);
        if (!makes_dv && turn > 0) add_to_dq(turn - 1);
        if (turn > 0) store_d_bias(turn - 1);

        constexpr int kCopyGroup = 4, kCopyGroups = (QueryCopy::kCopies + kCopyGroup - 1) / kCopyGroup;
        constexpr bool kCopiesTogether = !kFloat && T::kDim <= 64 && T::kBlockM <= 64; // of Q and dO
        const auto copy_next_d_o = [&] {
            copy_d_o(next).all(smem.d_o[stage ^ 1], plan.has_blind_rows ? next.lse : nullptr);
        };

        // S^T, or dP^T, of the warp's keys and the pair's queries.
        float acc_s[kMTiles][kNTiles][4] = {};
        {
            const auto place_a = M::place_a(makes_dv ? smem.k : smem.v, key_warp * T::kWarpKeys);
            const auto place_b = M::place_b(makes_dv ? smem.q[stage] : smem.d_o[stage], half * T::kWarpQueries);
            if constexpr (kFloat) {
                multiply_rows<T::kDim>(acc_s, place_a, place_b, [&](int d) {
#pragma unroll
                    for (int n = 0; n < QueryCopy::kCopies; ++n)
                        if (n / kCopyGroup * T::kDim / kCopyGroups / M::kDepth == d / M::kDepth)
                            next_q.part(smem.q[stage ^ 1], n);
                });
            } else {
                // 16 queries of a part of the depth are a step. Where registers are left, operands are loaded a step
                // ahead.
                constexpr int kAhead = T::kHalves == 2;
                constexpr int kQuerySteps = T::kWarpQueries / 16, kSteps = T::kDim / M::kDepth * kQuerySteps;
                static_assert((kCopyGroups - 1) * kSteps / kCopyGroups + kAhead < kSteps, "all copies are issued");
                typename M::A a[2][kMTiles];
                typename M::B queries[2][2];
                const auto load_a = [&](int step) {
                    const int d = step / kQuerySteps * M::kDepth;
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i) M::load_a(a[step / kQuerySteps % 2][i], place_a, 16 * i, d);
                };
                const auto load_b = [&](int step) {
                    const int d = step / kQuerySteps * M::kDepth;
                    M::load_b(queries[step % 2], place_b, d, step % kQuerySteps * 16);
                };
                load_b(0);
                if (kAhead) load_a(0);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    if ((step + kAhead) % kQuerySteps == 0 && step + kAhead < kSteps) load_a(step + kAhead);
                    if (step + 1 < kSteps) load_b(step + 1);
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                        for (int j = 0; j < 2; ++j)
                            M::multiply(acc_s[i][step % kQuerySteps * 2 + j], a[step / kQuerySteps % 2][i],
                                        queries[step % 2][j]);
#pragma unroll
                    for (int n = 0; n < QueryCopy::kCopies; ++n)
                        if (n / kCopyGroup * kSteps / kCopyGroups + kAhead == step) next_q.part(smem.q[stage ^ 1], n);
                    if (kCopiesTogether && step == 0) copy_next_d_o();
                }
            }
        }
        if (!kCopiesTogether) copy_next_d_o();

        const bool wants_slopes = kIsAny && plan.slope_sums != nullptr;
        const auto place_of_ds = [&] { // of the warp's keys: where a lane stores dS^T
            LanePlace place(smem.ds[stage], key_warp * T::kWarpKeys + lane / 4, kFloat ? lane % 4 / 2 : 0);
            place.address += kFloat ? lane % 2 * 8 : lane % 4 * 4;
            return place;
        };
        const auto ds_word = [&](const auto &place, int n, int i, int word) { // of an A
            return place.at(16 * i + word % 2 * 8, half * T::kWarpQueries / 8 + 2 * n + word / 2);
        };
        // acc += A's queries 16 n to 16 n + 15 times those of B. The tensor cores are at it while the warp does what is
        // beside: the first fragments of B are read before beside() stores.
        const auto add_beside = [&](const auto &place_b, int n, const auto &a, const auto &beside) {
            if constexpr (!kFloat) {
                typename M::B b[T::kDim / 16][2];
                const auto load = [&](int begin, int end) {
#pragma unroll
                    for (int d = begin; d < end; d += 16) M::load_b_transposed(b[d / 16], place_b, 16 * n, d);
                };
                constexpr int kFirst = kIsAny ? 0 : T::kDim < 96 ? T::kDim : 96; // as registers are left
                load(0, kFirst);
                beside();
                load(kFirst, T::kDim);
#pragma unroll
                for (int d = 0; d < T::kDim; d += 16)
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                        for (int j = 0; j < 2; ++j) M::multiply(acc[i][d / 8 + j], a[i][n][0], b[d / 16][j]);
            }
        };

        // Float32: acc += what stands in acc_s, split, times all queries of B.
        const auto add_split = [&](auto &tile_b) {
            const auto place_b = M::place_b_transposed(tile_b);
#pragma unroll
            for (int n = 0; n < T::kBlockM / 16; ++n) {
                typename M::A a[kMTiles][kParts];
#pragma unroll
                for (int i = 0; i < kMTiles; ++i) M::from_scores(a[i], acc_s[i][2 * n], acc_s[i][2 * n + 1]);
                add_product(acc, a, place_b, 16 * n);
            }
        };

        const int pair_row = half * T::kWarpQueries + lane % 4 * 2; // in the block
        auto &p_fragments = smem.p[key_warp][half];
        // Barriers of two warps: two of the pair, one of the value warps that share keys, one of their key warps. P^T goes
        // to the pair in two parts: dS^T of the first begins before the second is made.
        const int pair_barrier = 1 + 2 * (key_warp * T::kHalves + half);
        const int partner_barrier = 1 + T::kKeyWarps * (2 * T::kHalves + !makes_dv) + key_warp;
        constexpr int kPartQueries = kFloat || T::kWarpQueries < 32 ? T::kWarpQueries : T::kWarpQueries / 2;
        if (makes_dv) {
            const int thread_query = now_m0 + pair_row, thread_key = key0 + key_warp * T::kWarpKeys + lane / 4;
            float natural = scale; // a score of 1
            uint32_t kept[kMTiles][T::kWarpQueries / 64 + 1] = {};
            bool drops = false;
            if constexpr (kModified) {
                const MmaScoreRule &rule = smem.rules[turn / of_head % 3];
                float last_slope = 1;
                modify_scores<kFeatures, Element, true>(
                    acc_s, forward, seq, scores, rule, thread_query, thread_key,
                    [&](int i, int j, int entry, float slope) {
                        if constexpr (kCaps) {
                            auto &to_pair = smem.cap[key_warp][half].x[j / 2][i];
                            if constexpr (kFloat) {
                                reinterpret_cast<float *>(&to_pair[j % 2][lane])[entry] = slope;
                            } else {
                                if (entry % 2)
                                    reinterpret_cast<uint32_t *>(&to_pair[0][lane])[j % 2 * 2 + entry / 2] =
                                        M::round_pair(last_slope, slope);
                                last_slope = slope;
                            }
                        }
                    },
                    staged_bias());
                if (turn + 1 < turns) {
                    __syncwarp(); // the bias was read
                    copy_bias((turn + 1) / of_head, next.m0);
                }
                natural = scores.unit;
                drops = meets<kFeatures, kDropout>(scores.drops);
                if (drops)
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                        for (int n = 0; n < T::kWarpQueries / 16; n += 4)
                            kept[i][n / 4] = kept_transposed<(T::kWarpQueries < 64 ? T::kWarpQueries / 16 : 4)>(
                                scores, rule, now_m0 + half * T::kWarpQueries + 16 * n,
                                key0 + key_warp * T::kWarpKeys + 16 * i);
            }
            if (!is_whole || (!kFloat && is_far)) {
                if (!is_whole) hide_scores<true>(acc_s, forward, seq, thread_query, thread_key);
                if (!kFloat && is_far) { // no product of lse would be exact enough: S - lse is made on its own
#pragma unroll
                    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const float lse = smem.far_lse[stage][pair_row + 8 * j + e];
                            const float correction = smem.correction[stage][pair_row + 8 * j + e];
#pragma unroll
                            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                                for (int entry = e; entry < 4; entry += 2)
                                    acc_s[i][j][entry] = product(acc_s[i][j][entry], natural) - lse - correction;
                        }
                    natural = 1;
                }
            }
            if constexpr (kFloat) { // no product of lse would be exact enough: S - lse is made on its own
#pragma unroll
                for (int n = 0; n < T::kWarpQueries / 16; ++n)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const int j = 2 * n + side;
                        const float2 lse = *reinterpret_cast<const float2 *>(&smem.lse[stage][pair_row + 8 * j]);
                        const float2 correction =
                            *reinterpret_cast<const float2 *>(&smem.correction[stage][pair_row + 8 * j]);
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i) {
                            float (&p)[4] = acc_s[i][j];
                            float sent[4];
#pragma unroll
                            for (int entry = 0; entry < 4; ++entry) {
                                const float s = product(p[entry], natural);
                                p[entry] = exp_of(entry % 2 ? s - lse.y - correction.y : s - lse.x - correction.x);
                                sent[entry] = p[entry];
                                if constexpr (kDrops) {
                                    const int bit = entry % 2 * 16 + n % 4 * 4 + entry / 2 * 2 + side;
                                    if (drops && !(kept[i][n / 4] >> bit & 1)) // the key warp knows by the sign
                                        sent[entry] = -p[entry], p[entry] = 0;
                                }
                            }
                            p_fragments.x[n][i][side][lane] = make_float4(sent[0], sent[1], sent[2], sent[3]);
                        }
                    }
                barrier_arrive(pair_barrier, 64); // P^T is there
                add_split(smem.d_o[stage]);
            } else {
                const float unit = natural * kLog2E;
                constexpr int kSteps = T::kWarpQueries / 16; // of 16 queries
                typename M::A p[kMTiles][kSteps][1];
                float2 lse[2][2]; // loaded a step ahead
                const auto place_rest = place_of_ds();
                const auto load_lse = [&](int n) {
#pragma unroll
                    for (int side = 0; side < 2; ++side)
                        lse[n % 2][side] =
                            *reinterpret_cast<const float2 *>(&smem.lse[stage][pair_row + 16 * n + 8 * side]);
                };
                const auto make_p = [&](int n) {
                    if (n + 1 < kSteps) load_lse(n + 1);
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const float shift[2] = {lse[n % 2][side].x * kLog2E, lse[n % 2][side].y * kLog2E};
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                            for (int entry = 0; entry < 4; ++entry) {
                                float &s = acc_s[i][2 * n + side][entry];
                                s = ex2_approx(fmaf(s, unit, -shift[entry % 2]));
                            }
                    }
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i) {
                        M::from_scores(p[i][n], acc_s[i][2 * n], acc_s[i][2 * n + 1]);
                        uint4 &to_pair = p_fragments.x[n][i][0][lane];
                        to_pair = *reinterpret_cast<const uint4 *>(&p[i][n][0]);
                        if constexpr (kIsAny) {
                            if (wants_slopes) // what rounding took from P, where dS^T will stand
#pragma unroll
                                for (int word = 0; word < 4; ++word) {
                                    const float2 rounded = unpack(p[i][n][0].x[word], kDtype<Element>);
                                    const float *exact = &acc_s[i][2 * n + word / 2][word % 2 * 2];
                                    store_shared(ds_word(place_rest, n, i, word),
                                                 M::round_pair(exact[0] - rounded.x, exact[1] - rounded.y));
                                }
                        }
                        if constexpr (kDrops) {
                            if (drops) { // the key warp knows by the sign
                                uint32_t *words = p[i][n][0].x, *sent = reinterpret_cast<uint32_t *>(&to_pair);
#pragma unroll
                                for (int word = 0; word < 4; ++word) {
                                    const uint32_t mask = kept_pair(kept[i][n / 4], n % 4, word / 2, word % 2);
                                    sent[word] = words[word] | (~mask & 0x80008000);
                                    words[word] &= mask;
                                }
                            }
                        }
                    }
                    if (16 * (n + 1) % kPartQueries == 0) // a part of P^T is there
                        barrier_arrive(pair_barrier + 16 * n / kPartQueries, 64);
                };
                const auto place_b = M::place_b_transposed(smem.d_o[stage], 0, half * M::kColumnsIn16);
                load_lse(0);
                make_p(0);
                if constexpr (T::kHalves == 1) {
#pragma unroll
                    for (int n = 0; n < kSteps; ++n)
                        add_beside(place_b, n, p, [&] {
                            if (n + 1 < kSteps) make_p(n + 1);
                        });
                } else {
#pragma unroll
                    for (int n = 1; n < kSteps; ++n) make_p(n);
                    barrier_wait(partner_barrier, 64); // P^T of both pairs is there
#pragma unroll
                    for (int n = 0; n < T::kBlockM / 16; ++n) {
                        typename M::A a[kMTiles][1];
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i) {
                            *reinterpret_cast<uint4 *>(&a[i][0]) =
                                smem.p[key_warp][n / (T::kWarpQueries / 16)].x[n % (T::kWarpQueries / 16)][i][0][lane];
                            if constexpr (kDrops)
#pragma unroll
                                for (uint32_t &word : a[i][0].x) word &= ~sign_halves(word); // dropped
                        }
                        add_product<T::kHalves>(acc, a, place_b, 16 * n);
                    }
                }
            }
            if (turn > 0) add_to_dq(turn - 1);
        } else {
            barrier_wait(pair_barrier, 64); // P^T is there, or the first part
            const bool caps = meets<kFeatures, kSoftcap>(scores.caps);
            float slope_sum = 0, position0 = 0, distance0 = 0; // of this thread's first query, and to its first key
            if constexpr (kIsAny) {
                const int position = now_m0 + pair_row + len_k - len_q; // floats of a difference: both may be large
                position0 = static_cast<float>(position);
                distance0 = static_cast<float>(position - key0 - key_warp * T::kWarpKeys - lane / 4);
            }
            const auto place_store = place_of_ds();
            if constexpr (kFloat) {
#pragma unroll
                for (int n = 0; n < T::kWarpQueries / 16; ++n)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const float2 delta =
                            *reinterpret_cast<const float2 *>(&smem.delta[stage][pair_row + 16 * n + 8 * side]);
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i) {
                            float (&dp)[4] = acc_s[i][2 * n + side];
                            const float4 p4 = p_fragments.x[n][i][side][lane];
                            float4 cap4 = make_float4(1, 1, 1, 1);
                            if constexpr (kCaps)
                                if (caps) cap4 = smem.cap[key_warp][half].x[n][i][side][lane];
                            const float p[4] = {p4.x, p4.y, p4.z, p4.w}, cap[4] = {cap4.x, cap4.y, cap4.z, cap4.w};
#pragma unroll
                            for (int entry = 0; entry < 4; ++entry) {
                                if constexpr (kDrops)
                                    dp[entry] = __float_as_uint(p[entry]) >> 31 ? 0 : dp[entry] * keep;
                                dp[entry] = fabsf(p[entry]) * (dp[entry] - (entry % 2 ? delta.y : delta.x));
                                if constexpr (kModified) {
                                    if (wants_slopes) {
                                        const float query = static_cast<float>(16 * n + 8 * side + entry % 2);
                                        const float key = static_cast<float>(16 * i + entry / 2 * 8);
                                        slope_sum += dp[entry] *
                                                     (fabsf(distance0 + query - key) - slope_origin(position0 + query));
                                    }
                                    dp[entry] *= cap[entry];
                                }
                            }
#pragma unroll
                            for (int upper = 0; upper < 2; ++upper)
                                store_shared_2(place_store.at(16 * i + 8 * upper, 4 * n + 2 * side),
                                               __float_as_uint(dp[2 * upper]), __float_as_uint(dp[2 * upper + 1]));
                        }
                    }
                add_split(smem.q[stage]);
            } else {
                constexpr int kSteps = T::kWarpQueries / 16; // of 16 queries
                typename M::A ds[kMTiles][kSteps][1];
                uint4 p[2]; // of 16 keys, loaded a step ahead
                const auto make_ds = [&](int n) {
                    const float2 left = *reinterpret_cast<const float2 *>(&smem.delta[stage][pair_row + 16 * n]);
                    const float2 right = *reinterpret_cast<const float2 *>(&smem.delta[stage][pair_row + 16 * n + 8]);
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i) {
                        const int step = n * kMTiles + i, next = step + 1;
                        if (step == 0) p[0] = p_fragments.x[0][0][0][lane];
                        if (next % kMTiles == 0 && 16 * next / kMTiles == kPartQueries && next < kSteps * kMTiles)
                            barrier_wait(pair_barrier + 1, 64); // the second part is there
                        if (next < kSteps * kMTiles)
                            p[next % 2] = p_fragments.x[next / kMTiles][next % kMTiles][0][lane];
                        const uint32_t words[4] = {p[step % 2].x, p[step % 2].y, p[step % 2].z, p[step % 2].w};
                        uint4 cap = make_uint4(0, 0, 0, 0);
                        if constexpr (kCaps)
                            if (caps) cap = smem.cap[key_warp][half].x[n][i][0][lane];
                        const uint32_t cap_words[4] = {cap.x, cap.y, cap.z, cap.w};
#pragma unroll
                        for (int word = 0; word < 4; ++word) { // a row of a tile of 8 columns
                            const float2 delta = word < 2 ? left : right;
                            float2 pair = unpack(words[word], kDtype<Element>);
                            float &dp0 = acc_s[i][2 * n + word / 2][word % 2 * 2], &dp1 = (&dp0)[1];
                            if constexpr (kDrops) {
                                dp0 = words[word] & 0x8000 ? 0 : dp0 * keep;
                                dp1 = words[word] & 0x80000000 ? 0 : dp1 * keep;
                                pair.x = fabsf(pair.x), pair.y = fabsf(pair.y);
                            }
                            dp0 -= delta.x, dp1 -= delta.y;
                            if constexpr (kIsAny) {
                                if (wants_slopes) { // of P unrounded: dS of a row cancels, whatever the distance
                                    const float2 rest =
                                        unpack(load_shared(ds_word(place_store, n, i, word)), kDtype<Element>);
                                    const float query = static_cast<float>(16 * n + word / 2 * 8);
                                    const float key = static_cast<float>(16 * i + word % 2 * 8);
                                    const float distance = distance0 + query - key, position = position0 + query;
                                    slope_sum +=
                                        (pair.x + rest.x) * dp0 * (fabsf(distance) - slope_origin(position)) +
                                        (pair.y + rest.y) * dp1 * (fabsf(distance + 1) - slope_origin(position + 1));
                                }
                            }
                            dp0 *= pair.x, dp1 *= pair.y;
                            if constexpr (kCaps) {
                                if (caps) {
                                    const float2 slope = unpack(cap_words[word], kDtype<Element>);
                                    dp0 *= slope.x, dp1 *= slope.y;
                                }
                            }
                        }
                        M::from_scores(ds[i][n], acc_s[i][2 * n], acc_s[i][2 * n + 1]);
#pragma unroll
                        for (int word = 0; word < 4; ++word)
                            store_shared(ds_word(place_store, n, i, word), ds[i][n][0].x[word]);
                    }
                };
                const auto place_b = M::place_b_transposed(smem.q[stage], 0, half * M::kColumnsIn16);
                make_ds(0);
                if constexpr (T::kHalves == 1) {
#pragma unroll
                    for (int n = 0; n < kSteps; ++n)
                        add_beside(place_b, n, ds, [&] {
                            if (n + 1 < kSteps) make_ds(n + 1);
                        });
                } else {
#pragma unroll
                    for (int n = 1; n < kSteps; ++n) make_ds(n);
                    const auto place_ds = M::place_a(smem.ds[stage], key_warp * T::kWarpKeys);
                    barrier_wait(partner_barrier, 64); // dS^T of both pairs is there
#pragma unroll
                    for (int n = 0; n < T::kBlockM / 16; ++n) {
                        typename M::A a[kMTiles][1];
#pragma unroll
                        for (int i = 0; i < kMTiles; ++i) M::load_a(a[i][0], place_ds, 16 * i, 16 * n);
                        add_product<T::kHalves>(acc, a, place_b, 16 * n);
                    }
                }
            }
            if constexpr (kIsAny) {
                if (wants_slopes) {
                    slope_total += slope_sum;
                    if ((turn + 1) % of_head == 0) {
                        for (int step = 16; step > 0; step /= 2) slope_total += __shfl_xor_sync(~0u, slope_total, step);
                        if (lane == 0) smem.slopes[turn / of_head % 2][warp] = slope_total;
                        slope_total = 0;
                    }
                }
            }
        }
    }
    cp_async_commit();
    cp_async_wait<0>(); // no copy outlives its block
    __syncthreads();    // dS of the last turn is there, V was read
    if (turns > 0) store_slopes(group - 1), store_d_bias(turns - 1), add_to_dq(turns - 1);
    __syncthreads(); // dQ' of the last turn, too; K was read: dK and dV take the places of K and V
    if (turns > 0) tell_added(turns - 1);

    const float factor = makes_dv ? keep : scale;
    if constexpr (kFloat) {
        const int64_t width = makes_dv ? forward.head_dim_v : forward.head_dim;
        const Rows<float> out(makes_dv ? args.d_v : args.d_k, FA_FLOAT32, seq.batch_index, h_kv, seq.row_k, width);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                const int key = key0 + key_warp * T::kWarpKeys + 16 * i + 8 * upper + lane / 4;
#pragma unroll
                for (int j = 0; j < kOTiles; j += 2) {
                    const float4 x = M::four_columns(acc[i][j], acc[i][j + 1], upper);
                    const int column = 8 * j + lane % 4 * 4;
                    if (key < len_k && column < width)
                        *reinterpret_cast<float4 *>(out.at(key, column)) =
                            make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
                }
            }
    } else {
        auto &out = makes_dv ? smem.v : smem.k;
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kOTiles; ++j)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    auto *at = out.at(key_warp * T::kWarpKeys + 16 * i + 8 * upper + lane / 4,
                                      T::kHalves * (j / 2 * 2) + 2 * half + j % 2);
                    store_shared(shared_address(at) + lane % 4 * 4,
                                 M::round_pair(acc[i][j][2 * upper] * factor, acc[i][j][2 * upper + 1] * factor));
                }
        __syncthreads(); // they are there
        const Rows<float> d_k(args.d_k, kDtype<Element>, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
        const Rows<float> d_v(args.d_v, kDtype<Element>, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
        constexpr int kColumns = T::kDim / 8;
        for (int index = threadIdx.x; index < T::kBlockN * kColumns; index += T::kThreads) {
            const int r = index / kColumns, column = index % kColumns;
            if (key0 + r >= len_k) break;
            if (column * 8 < forward.head_dim)
                *reinterpret_cast<uint4 *>(d_k.at(key0 + r, column * 8)) =
                    *reinterpret_cast<const uint4 *>(smem.k.at(r, column));
            if (column * 8 < forward.head_dim_v)
                *reinterpret_cast<uint4 *>(d_v.at(key0 + r, column * 8)) =
                    *reinterpret_cast<const uint4 *>(smem.v.at(r, column));
        }
    }
}

#endif
