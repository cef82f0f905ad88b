// Attention of a few new tokens over a cache of keys and values: reads each key once, at the speed of memory.
//
//   o_i = sum_j e^(s_ij - m_i) v_j / l_i,  over keys in parts that many blocks share     Dao et al., Flash-Decoding (2023)
//
// A block per SM takes a part of all lines' turns (decode_plan.cuh) and walks over it. Its warps have three trades, each with
// a way of its own through the part:
//
//   copiers     wait until a stage is empty | copy a turn's K, V to it, and a line's Q | stage is full
//   attenders   wait until a stage is full  | (m, l, O) of the turn, by 16 keys a warp | stage is empty, sums are there
//   folders     wait for the sums           | fold them: turn, 4 turns, 16, the line   | sums were read; store the line
//
// kStages turns are in shared memory or on their way. Where a part ends within a line, sums are told to decode_merge, which
// starts while this kernel runs and waits for it. New tokens are rotated by the copiers, who take them from k and v, not from
// the cache; the block that has their turn of the first rows stores them there.
//
// T makes a turn's (m, l, O): on tensor cores (decode_tensor_core.cuh) or CUDA cores (decode_fused.cuh).
#ifndef FA_DECODE_CUH
#define FA_DECODE_CUH

#include "cuda/decode_merge.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"

enum { kSumsFull = 1, kSumsEmpty = 2 }; // named barriers: attenders arrive and folders wait; the other way round

template <typename T>
struct DecodeSmem {
    typename T::Stage stage[T::kStages];
    typename T::Sums sums;
    typename T::Queries queries[2]; // of this line and the next
    Mbarrier queries_empty[2];      // attenders arrive, a lane of each warp; copiers wait
    Cursor<T::kKeys> part;
    Mbarrier full[T::kStages];  // copiers arrive, each thread twice; attenders wait
    Mbarrier empty[T::kStages]; // attenders arrive, a lane of each warp; copiers wait
};

// Stages in turn, and the parity of the phase that a wait is for.
template <int kStages>
struct StageRing {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// What folders do. A thread has four columns of every kRowStep-th row; warps whose rows are not there have little to do.
template <typename T>
__device__ __forceinline__ void fold_turns(const typename T::Sums &sums, const fa_kvcache_args &args,
                                           const DecodePlan &plan, Cursor<T::kKeys> &turn) {
    using Real = typename T::Real;
    constexpr int kSumThreads = T::kAttenders + T::kFolders;
    constexpr int kChunks = T::kChunks, kQuads = T::kDim / 4, kRowStep = T::kFolders / kQuads;
    static_assert(kChunks * kRowStep == T::kRows);
    const int thread = static_cast<int>(threadIdx.x) - T::kCopiers - T::kAttenders;
    const int own_row = thread / kQuads, own_col = thread % kQuads * 4;
    Tree<Real, kChunks> tree;
    int slot = 0;
    for (; turn.left > 0; turn.advance(args, plan)) {
        const int chunks = (turn.rows(plan, T::kRows) - own_row + kRowStep - 1) / kRowStep; // whose rows are there
        const bool is_last = turn.left == 1;
        Part<Real> node[kChunks];
        barrier_wait(kSumsFull, kSumThreads);
#pragma unroll
        for (int e = 0; e < kChunks; ++e)
            if (e < chunks) node[e] = T::part_of(sums, own_row + e * kRowStep, own_col);
        if (!is_last) barrier_arrive(kSumsEmpty, kSumThreads);

        if (turn.begins_line()) slot = first_slot(plan, turn.part_begin > turn.of.turns.first);
        const auto tell = [&](const Part<Real>(&parts)[kChunks]) {
            const Slot<Real, T::kDim> to(plan, static_cast<int>(blockIdx.x), slot++);
#pragma unroll
            for (int e = 0; e < kChunks; ++e)
                if (e < chunks) to.store_part(plan, own_row + e * kRowStep, own_col, parts[e]);
        };
        if (tree.push(node, chunks, turn.turn, turn.turn + 1, turn.of.turns, turn.part_begin, tell)) {
            if (own_col < args.head_dim_v)
#pragma unroll
                for (int e = 0; e < kChunks; ++e)
                    if (e < chunks)
                        store_result(args, tree.state[kLevels - 1][e], turn.b, turn.head,
                                     QueryRow(plan, turn.head, turn.row0(T::kRows) + own_row + e * kRowStep), own_col);
        } else if (is_last && !turn.ends_line()) {
            tree.leave(turn.turn + 1, turn.of.turns, turn.part_begin, tell);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads) __maxnreg__(T::kRegisters)
    decode(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    constexpr int kSumThreads = T::kAttenders + T::kFolders;
    extern __shared__ __align__(1024) unsigned char shared[];
    DecodeSmem<T> &smem = *reinterpret_cast<DecodeSmem<T> *>(shared);

    warm_constants(args, plan);
    let_dependents_start();
    Cursor<T::kKeys> turn;
    if (threadIdx.x < 32) {
        turn.find(args, plan, static_cast<int>(blockIdx.x));
        if (threadIdx.x == 0) smem.part = turn;
    } else if (threadIdx.x < 32 + T::kStages) {
        smem.full[threadIdx.x - 32].init(2 * T::kCopiers);
        smem.empty[threadIdx.x - 32].init(T::kAttenders / 32);
        if (threadIdx.x < 32 + 2) smem.queries_empty[threadIdx.x - 32].init(T::kAttenders / 32);
    }
    __syncthreads(); // the part and the barriers are there
    turn = smem.part;
    StageRing<T::kStages> ring;
    StageRing<2> lines;
    if (threadIdx.x < T::kCopiers) {
        typename T::Copier copier;
        if (turn.left > 0) copier.look_up(args, plan, turn);
        for (; turn.left > 0; ring.advance()) {
            smem.empty[ring.stage].wait(ring.parity ^ 1);
            copier.copy(smem.stage[ring.stage], args, plan, turn);
            if (turn.begins_line()) {
                smem.queries_empty[lines.stage].wait(lines.parity ^ 1);
                copier.load(smem.queries[lines.stage], args, plan, turn);
                lines.advance();
            }
            smem.full[ring.stage].arrive_after_copies();
            smem.full[ring.stage].arrive();
            turn.advance(args, plan);
            if (turn.left > 0) copier.look_up(args, plan, turn);
        }
        cp_async_commit();
        cp_async_wait<0>(); // no copy outlives its block
    } else if (threadIdx.x < T::kCopiers + T::kAttenders) {
        typename T::Attender attender;
        const auto leave = [](Mbarrier &barrier) {
            __syncwarp(); // all lanes have read
            if (threadIdx.x % 32 == 0) barrier.arrive();
        };
        for (bool is_first = true; turn.left > 0; is_first = false, ring.advance()) {
            if (turn.begins_line()) attender.begin_line(args, plan, turn);
            smem.full[ring.stage].wait(ring.parity);
            attender.attend(smem.stage[ring.stage], smem.queries[lines.stage], args, plan, turn, smem.sums, is_first);
            leave(smem.empty[ring.stage]);
            barrier_arrive(kSumsFull, kSumThreads);
            if (turn.ends_line()) {
                leave(smem.queries_empty[lines.stage]);
                lines.advance();
            }
            turn.advance(args, plan);
        }
    } else {
        fold_turns<T>(smem.sums, args, plan, turn);
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------------

// Turns that the longest sequence may have, and lines of all sequences.
template <typename T>
static int64_t most_turns(const fa_kvcache_args *args) {
    return fa_max(fa_ceil_div(args->max_pages * args->page_size, T::kKeys), 1);
}
template <typename T>
static int64_t lines_of(const fa_kvcache_args *args) {
    return args->heads_kv * fa_ceil_div(args->heads_q / args->heads_kv * args->seqlen_q, T::kRows) * args->batch;
}

template <typename T>
static DecodePlan decode_plan(const fa_kvcache_args *args) {
    constexpr int64_t kMostNodes = kMergeList - 32; // of 16 turns that a part tells of: they fit decode_merge's list
    const int64_t group = args->heads_q / args->heads_kv, rows = group * args->seqlen_q;
    const int64_t m_blocks = fa_ceil_div(rows, T::kRows), lines = lines_of<T>(args), turns = most_turns<T>(args);
    int device = 0, processors = 1;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int64_t least_parts = fa_ceil_div(turns, 16 * kMostNodes); // of a line
    const int64_t parts_a_line = args->num_splits > 0 ? fa_max(fa_min(args->num_splits, turns), least_parts) : 0;
    const int64_t blocks =
        parts_a_line ? lines * parts_a_line : fa_min(fa_max(processors, least_parts * lines), lines * turns);
    const int64_t most_in_part = parts_a_line ? fa_ceil_div(turns, parts_a_line)
                                              : fa_min(fa_ceil_div(lines * turns, fa_max(blocks, 1)) + 16, turns);
    const int64_t slots = most_in_part / 16 + 2 * 3 + 2 + kLevels;
    const bool merges_lines = parts_a_line || lines < blocks;
    const auto strides = [&](const fa_tensor &cache) {
        const int64_t bytes = fa_dtype_bytes(args->cache_dtype);
        return CacheStrides{static_cast<uint32_t>(cache.stride_b * bytes / 16),
                            static_cast<uint32_t>(cache.stride_l * bytes / 16)};
    };
    const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
    return {divisor(args->page_size),
            divisor(group),
            divisor(m_blocks),
            divisor(blocks),
            static_cast<int>(rows),
            static_cast<int>(args->heads_kv * m_blocks),
            static_cast<int>(blocks),
            static_cast<int>(parts_a_line),
            static_cast<int>(slots),
            static_cast<int>(fa_min(rows, T::kRows)),
            merges_lines,
            !args->page_table || (args->page_size > 0 && args->page_size % T::kKeys == 0),
            args->softcap > 0 || args->alibi_slopes.data || args->tree_mask,
            strides(args->k_cache),
            strides(args->v_cache),
            args->workspace};
}

template <typename T>
static size_t decode_bytes(const fa_kvcache_args *args) {
    const DecodePlan plan = decode_plan<T>(args);
    return static_cast<size_t>(plan.blocks) * plan.slots * plan.slot_rows * (T::kDim + 4) * sizeof(typename T::Real);
}

template <typename T>
static bool decode_fits() {
    return fa_allow_shared(reinterpret_cast<const void *>(decode<T>), sizeof(DecodeSmem<T>));
}

template <typename T>
static fa_status launch_decode(const fa_kvcache_args *args) {
    using Real = typename T::Real;
    FA_REQUIRE(lines_of<T>(args) * most_turns<T>(args) <= INT32_MAX, FA_ERROR_UNSUPPORTED,
               "decode: %lld times %lld keys that %d rows share: more than 2^31 times %d",
               static_cast<long long>(lines_of<T>(args)), static_cast<long long>(most_turns<T>(args) * T::kKeys),
               T::kRows, T::kKeys);
    const DecodePlan plan = decode_plan<T>(args);
    const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
    FA_CHECK(fa_launch("decode", decode<T>, plan.blocks, T::kThreads, sizeof(DecodeSmem<T>), stream, *args, plan));
    if (plan.blocks <= 1 || plan.parts_a_line == 1) return FA_OK; // no line is shared
    const int64_t shared_lines = plan.merges_lines ? lines_of<T>(args) : plan.blocks - 1;
    const int64_t row_blocks = fa_ceil_div(plan.slot_rows * T::kDim, kMergeThreads);
    return fa_launch_dependent("merging of decoded parts", decode_merge<Real, T::kDim, T::kKeys, T::kRows>,
                               dim3(static_cast<unsigned>(shared_lines), static_cast<unsigned>(row_blocks)),
                               kMergeThreads, stream, *args, plan);
}

#endif
