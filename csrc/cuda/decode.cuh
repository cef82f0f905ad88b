// Attention of a few new tokens over a cache of keys and values: reads each key once, at the speed of memory.
//
//   o_i = sum_j e^(s_ij - m_i) v_j / l_i,  over keys in parts that many blocks share     Dao et al., Flash-Decoding (2023)
//
// A block per SM takes a part of all lines' turns (decode_plan.cuh) and walks over it; kStages turns are in shared memory or
// on their way:
//
//   wait, barrier | copy a later turn's K, V | attend: (m, l, O) of this turn | fold into the sums of 4, 16 turns, the line
//
// Where a line is complete its result is stored. Where a part ends within one, sums are told to decode_merge, which starts
// while this kernel runs and waits for it. New tokens are rotated, stored in the cache by the one block that has their turn
// of the first rows, and taken from k and v, not from the cache, by all.
//
// T makes a turn's (m, l, O): on tensor cores (decode_tensor_core.cuh) or CUDA cores (decode_fused.cu).
#ifndef FA_DECODE_CUH
#define FA_DECODE_CUH

#include "cuda/decode_merge.cuh"
#include "cuda/ptx/cp_async.cuh"

// What a thread knows of the line that its block is at.
struct DecodeLine {
    int b, head, row0, rows; // rows: of this line, at most kRows
};

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    decode(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    using Real = typename T::Real;
    constexpr int kChunks = T::kChunks, kQuads = T::kDim / 4, kRowStep = T::kThreads / kQuads;
    static_assert(kChunks * kRowStep == T::kRows, "a thread has four columns of every kRowStep-th row");
    extern __shared__ __align__(1024) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);

    let_dependents_start();
    Cursor<T::kKeys> turn(args, plan, static_cast<int>(blockIdx.x));
    Cursor<T::kKeys> ahead = turn; // what is copied next
    typename T::Copy copy;
    if (ahead.left > 0) copy.look_up(args, plan, ahead);
    const auto copy_next = [&](int stage) {
        if (ahead.left > 0) {
            copy.issue(smem.stage[stage], args, plan, ahead);
            ahead.advance(args, plan);
            if (ahead.left > 0) copy.look_up(args, plan, ahead);
        }
        cp_async_commit();
    };
    for (int stage = 0; stage < T::kStages - 1; ++stage) copy_next(stage);

    const int own_row = static_cast<int>(threadIdx.x) / kQuads, own_col = static_cast<int>(threadIdx.x) % kQuads * 4;
    Tree<Real, kChunks> tree;
    T attention;
    DecodeLine line;
    int part_begin = 0, slot = 0;
    bool is_new_line = true;
    for (int stage = 0; turn.left > 0; stage = stage + 1 == T::kStages ? 0 : stage + 1) {
        if (is_new_line) {
            line.b = turn.b, line.head = turn.head(plan), line.row0 = turn.row0(plan, T::kRows);
            line.rows = min(plan.rows - line.row0, static_cast<int>(T::kRows));
            attention.load_queries(smem, args, plan, turn, line);
            part_begin = turn.turn, slot = first_slot(plan, part_begin > turn.turns.first);
        }
        cp_async_wait<T::kStages - 2>();
        __syncthreads(); // keys, values and queries are there, the turn before was read
        copy_next(stage == 0 ? T::kStages - 1 : stage - 1);
        if (is_new_line) attention.take_queries(smem, args, plan, turn, line);
        Part<Real> node[kChunks];
        attention.attend(node, smem, smem.stage[stage], args, plan, turn, line);

        const auto tell = [&](const Part<Real>(&parts)[kChunks]) {
            const Slot<Real, T::kDim> to(plan, static_cast<int>(blockIdx.x), slot++);
#pragma unroll
            for (int e = 0; e < kChunks; ++e)
                if (own_row + e * kRowStep < line.rows) to.store_part(plan, own_row + e * kRowStep, own_col, parts[e]);
        };
        const bool is_complete = tree.push(node, turn.turn, turn.turn + 1, turn.turns, part_begin, tell);
        if (is_complete && own_col < args.head_dim_v) {
#pragma unroll
            for (int e = 0; e < kChunks; ++e) {
                const int row = own_row + e * kRowStep;
                if (row < line.rows)
                    store_result(args, tree.state[kLevels - 1][e], line.b, line.head,
                                 QueryRow(plan, line.head, line.row0 + row), own_col);
            }
        }
        is_new_line = turn.turn + 1 == turn.turns.last;
        if (!is_new_line && turn.left == 1) tree.leave(turn.turn + 1, turn.turns, part_begin, tell);
        turn.advance(args, plan);
    }
    cp_async_wait<0>(); // no copy outlives its block
}

// ---- launch ---------------------------------------------------------------------------------------------------------------

// Turns that the longest sequence may have, and lines there are.
template <typename T>
static int64_t most_turns(const fa_kvcache_args *args) {
    return fa_max(fa_ceil_div(args->max_pages * args->page_size, T::kKeys), 1);
}

template <typename T>
static DecodePlan decode_plan(const fa_kvcache_args *args) {
    constexpr int64_t kMostNodes = 480; // of 16 turns that a part tells of: they fit decode_merge's list
    const int64_t group = args->heads_q / args->heads_kv, rows = group * args->seqlen_q;
    const int64_t m_blocks = fa_ceil_div(rows, T::kRows), lines = args->heads_kv * m_blocks * args->batch;
    const int64_t turns = most_turns<T>(args);
    int device = 0, processors = 1;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int64_t least_parts = fa_ceil_div(turns, 16 * kMostNodes); // of a line
    const int64_t parts_a_line = args->num_splits > 0 ? fa_max(args->num_splits, least_parts) : 0;
    const int64_t blocks =
        parts_a_line ? lines * parts_a_line : fa_min(fa_max(processors, least_parts * lines), lines * turns);
    const int64_t most_in_part = parts_a_line ? fa_ceil_div(turns, parts_a_line)
                                              : fa_min(fa_ceil_div(lines * turns, fa_max(blocks, 1)) + 16, turns);
    const int64_t slots = most_in_part / 16 + 2 * 3 + 2 + kLevels;
    const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
    return {divisor(args->page_size),
            divisor(group),
            divisor(m_blocks),
            static_cast<int>(rows),
            static_cast<int>(args->heads_kv * m_blocks),
            static_cast<int>(blocks),
            static_cast<int>(parts_a_line),
            static_cast<int>(slots),
            static_cast<int>(fa_min(rows, T::kRows)),
            args->workspace};
}

template <typename T>
static size_t decode_bytes(const fa_kvcache_args *args) {
    const DecodePlan plan = decode_plan<T>(args);
    return static_cast<size_t>(plan.blocks) * plan.slots * plan.slot_rows * (T::kDim + 4) * sizeof(typename T::Real);
}

template <typename T>
static bool decode_fits() {
    return fa_allow_shared(reinterpret_cast<const void *>(decode<T>), sizeof(typename T::Smem));
}

template <typename T>
static fa_status launch_decode(const fa_kvcache_args *args) {
    using Real = typename T::Real;
    const DecodePlan plan = decode_plan<T>(args);
    const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
    FA_CHECK(fa_launch("decode", decode<T>, plan.blocks, T::kThreads, sizeof(typename T::Smem), stream, *args, plan));
    if (plan.blocks <= 1 || plan.parts_a_line == 1) return FA_OK; // no line is shared
    const int64_t cuts = plan.parts_a_line ? plan.blocks / plan.parts_a_line : plan.blocks - 1;
    const int64_t row_blocks = fa_ceil_div(plan.slot_rows * (T::kDim / 4), kMergeThreads);
    return fa_launch_dependent("merging of decoded parts", decode_merge<Real, T::kDim, T::kKeys, T::kRows>,
                               dim3(static_cast<unsigned>(cuts), static_cast<unsigned>(row_blocks)), kMergeThreads,
                               stream, *args, plan);
}

#endif
