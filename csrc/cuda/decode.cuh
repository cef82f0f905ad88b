// Attention of a few new tokens over a cache of keys and values: reads each key once, at the speed of memory.
//
//   o_i = sum_j e^(s_ij - m_i) v_j / l_i,  over keys in parts that many blocks share     Dao et al., Flash-Decoding (2023)
//
// A block per SM takes a part of all lines' turns (decode_plan.cuh) and walks over it. Its warps have three trades, each with
// a way of its own through the part:
//
//   copiers     wait until a stage is empty | copy a turn's K, V to it                   | stage is full
//   attenders   wait until a stage is full  | add the turn to the chunk's (m, l, O)      | stage is empty; chunk: sums are there
//   folders     wait for a chunk's sums     | fold them into the line's, or tell them    | sums were read; line: store o
//                                             and load the next line's Q                 | Q is there
//
// Several turns are in shared memory or on their way. New tokens are rotated by the copiers, who take them from k and v, not
// from the cache; the block that has their turn of the first rows stores them there.
//
// A block starts while the kernels before still run, finds its part by the lengths as they are then, and waits. After that
// the lengths are most often the same; if not it finds its part again, and copies again what it has begun with.
//
// What is told of a line that blocks share decode_merge folds, as soon as all of it is told: it starts while this kernel runs,
// after each of its blocks has marked what it will tell as not told yet.
//
// T makes a chunk's (m, l, O): on tensor cores (decode_tensor_core.cuh) or CUDA cores (decode_fused.cuh).
#ifndef FA_DECODE_CUH
#define FA_DECODE_CUH

#include "cuda/decode_merge.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"

enum { kMostStages = 16 };
enum { kSumsFull = 1, kSumsEmpty = 2, kOfAttenders = 3, kOfCopiers = 4 }; // named barriers

template <typename T>
struct DecodeSmem {
    typename T::Queries queries[2]; // of this line and the next
    typename T::Sums sums;
    Part<typename T::Real> line[T::kRows * T::kDim / 4]; // sums of the chunks before, of a line that the block begins
    Cursor<T::kKeys> part[2];                            // by the lengths as they were at first, and as they are
    Mbarrier queries_full[2];                            // folders arrive, each thread twice; attenders wait
    Mbarrier queries_empty[2];                           // attenders arrive, a lane of each warp; folders wait
    Mbarrier full[kMostStages];                          // copiers arrive, each thread twice; attenders wait
    Mbarrier empty[kMostStages];                         // attenders arrive, a lane of each warp; copiers wait
    typename T::Stage stages[1];                         // plan.stages of them
};

// Stages in turn, and the parity of the phase that a wait is for.
struct StageRing {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Whether lengths have changed while the block waited for the kernels before: its threads meet twice, before and after, and
// those that find the part say so.
__device__ __forceinline__ bool meet(bool has_changed = false) { return __syncthreads_or(has_changed); }

// The lengths that a guess is made of are read once: they may change from one reading to the next.
__device__ __forceinline__ bool can_guess(const fa_kvcache_args &args) { return args.batch <= GivenLengths::kCount; }

template <typename T>
__device__ __forceinline__ void copy_turns(DecodeSmem<T> &smem, const fa_kvcache_args &args, const DecodePlan &plan) {
    typename T::Copier copier(plan);
    StageRing ring;
    // 0, which ptxas cannot tell: in uniform registers it (CUDA 13.0) puts the stage's address where cp.async has its cache
    // hint, and the instruction is illegal.
    int thread = static_cast<int>(threadIdx.x);
    keep(thread);
    ring.stage = thread / T::kCopiers;
    Cursor<T::kKeys> turn, next; // next: its pages are on their way while a turn is copied, if there are any
    const auto start = [&](const Cursor<T::kKeys> &at) {
        turn = next = at;
        if constexpr (T::kLooksAhead) copier.look_up(args, plan, next);
    };
    // The first turn is copied as it seems to be, while it is found out whether it is.
    bool is_known = !can_guess(args);
    meet();
    if (is_known || args.page_table) wait_for_prerequisites(); // pages are written before
    if (is_known) meet();
    start(smem.part[is_known]);
    for (;;) {
        if (turn.begins_line()) copier.begin_line(args, plan, turn);
        if constexpr (T::kLooksAhead) {
            copier.take_pages();
            next.advance(args, plan);
            if (next.left > 0) copier.look_up(args, plan, next);
        }
        if (!is_known) wait_for_prerequisites();
        smem.empty[ring.stage].wait(ring.parity ^ 1);
        copier.copy(smem.stages[ring.stage], args, plan, turn);
        if (!is_known) {
            is_known = true;
            if (meet()) { // it is not: once more
                cp_async_commit();
                cp_async_wait<0>();
                barrier_wait(kOfCopiers, T::kCopiers); // no copy comes after what another thread puts in its place
                start(smem.part[1]);
                continue;
            }
        }
        if (turn.left <= 0) break;
        if (turn.has_new_tokens(args)) copier.add_new_tokens(smem.stages[ring.stage], args, plan, turn);
        smem.full[ring.stage].arrive_after_copies();
        smem.full[ring.stage].arrive();
        ring.advance(plan.stages);
        if constexpr (T::kLooksAhead)
            turn = next;
        else
            turn.advance(args, plan);
        if (turn.left <= 0) break;
    }
    cp_async_commit();
    cp_async_wait<0>(); // no copy outlives its block
}

template <typename T>
__device__ __forceinline__ void attend_turns(DecodeSmem<T> &smem, const fa_kvcache_args &args, const DecodePlan &plan) {
    const int thread = static_cast<int>(threadIdx.x) - T::kCopiers;
    if (thread < plan.stages) smem.full[thread].init(2 * T::kCopiers), smem.empty[thread].init(T::kAttenders / 32);
    if (thread < 2) smem.queries_full[thread].init(2 * kFolders), smem.queries_empty[thread].init(T::kAttenders / 32);
    meet();
    wait_for_prerequisites();
    meet();
    Cursor<T::kKeys> turn = smem.part[1];
    typename T::Attender attender;
    StageRing ring, lines;
    const auto leave = [](Mbarrier &barrier) {
        __syncwarp(); // all lanes have read
        if (threadIdx.x % 32 == 0) barrier.arrive();
    };
    bool has_told = false;
    while (turn.left > 0) {
        if (turn.begins_line()) {
            attender.begin_line(args, plan, turn);
            smem.queries_full[lines.stage].wait(lines.parity);
        }
        const int turns = turn.chunk_turns();
        const bool ends_line = turn.turn + turns == turn.of.turns.last;
        attender.begin_chunk();
        for (int n = 0; n < turns; ++n, ring.advance(plan.stages)) {
            smem.full[ring.stage].wait(ring.parity);
            attender.attend(smem.stages[ring.stage], smem.queries[lines.stage], args, plan, turn, turn.turn + n,
                            smem.sums);
            leave(smem.empty[ring.stage]);
        }
        if (has_told) barrier_wait(kSumsEmpty, T::kAttenders + kFolders);
        has_told = true;
        attender.end_chunk(smem.sums);
        barrier_arrive(kSumsFull, T::kAttenders + kFolders);
        turn.advance(args, plan, turns);
        if (ends_line) {
            leave(smem.queries_empty[lines.stage]);
            lines.advance(2);
        }
    }
    if (has_told) barrier_wait(kSumsEmpty, T::kAttenders + kFolders);
}

// By a warp, before decode_merge may start: what this block will tell has not been told yet. last: the line in which its part
// ends.
template <int kKeys>
__device__ __forceinline__ void announce(const DecodePlan &plan, const Cursor<kKeys> &turn, const ToldLine &last) {
    const int lane = threadIdx.x % 32;
    if (plan.places == 0) return;
    const bool goes_on = turn.left > 0 && turn.turn > turn.of.turns.first; // with a line that another block begins
    if (goes_on) {
        const int chunk = turn.chunk(), end = min(chunk + (turn.left - 1) / turn.of.chunk_turns + 1, turn.of.chunks);
        for (int n = chunk + lane; n < end; n += 32) told_flag(plan, turn.place, n) = 0;
    }
    const int nth = last.b * plan.lines + last.line;
    if (plan.has_line_places) { // before the last, the part has all of what it begins
        const int end = nth + (last.chunks >= 0);
        for (int n = turn.place + goes_on + lane; turn.left > 0 && n < end; n += 32)
            told_line(plan, n) = n == nth ? last : ToldLine{};
    } else if (lane == 0) {
        told_line(plan, static_cast<int>(blockIdx.x)) = last.chunks > 0 ? last : ToldLine{};
    }
    if (lane == 0 && last.chunks > 0)
        told_flag(plan, plan.has_line_places ? nth : static_cast<int>(blockIdx.x), last.first_chunk) = 0;
    __threadfence();
    __syncwarp();
}

// By the first warp of the folders, or by the others, which wait for it. Returns to it the line in which the part ends.
template <typename T>
__device__ __forceinline__ ToldLine find_part(DecodeSmem<T> &smem, const fa_kvcache_args &args, const DecodePlan &plan,
                                              bool finds) {
    GivenLengths lengths;
    Cursor<T::kKeys> part;
    ToldLine last;
    bool has_changed = false;
#pragma unroll 1
    for (int time = 0; time < 2; ++time) {
        if (finds && (time == 1 || can_guess(args))) {
            const GivenLengths before = lengths;
            lengths.read(args, 0);
            has_changed = time == 0 || !can_guess(args) || !(lengths == before);
            if (has_changed)
                last = part.find(args, plan, Partition<T::kKeys>(args, plan, lengths), static_cast<int>(blockIdx.x));
            if (threadIdx.x % 32 == 0) smem.part[time] = part;
            __syncwarp();
        }
        meet(has_changed);
        if (time == 0) wait_for_prerequisites();
    }
    return last;
}

// Some columns of a row; col(c): where column c of the part is.
template <typename Real, int kKeys, typename Col>
__device__ __forceinline__ void store_result(const fa_kvcache_args &args, const Cursor<kKeys> &turn,
                                             const QueryRow &row, Part<Real> part, const Col &col) {
    RowResult<Real>(args, turn.b, turn.head, row).finish(args, part, col(0) == 0);
    const int64_t at = fa_row_offset(&args.o, turn.b, row.h, row.i);
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (col(c) < args.head_dim_v) store(args.o.data, args.dtype, at + col(c), part.o[c]);
}

// A block that begins a line folds its chunks, one that goes on with it tells each. A thread has the same entries of all.
template <typename T>
__device__ __forceinline__ void fold_chunks(DecodeSmem<T> &smem, const fa_kvcache_args &args, const DecodePlan &plan) {
    using Real = typename T::Real;
    constexpr int kQuads = T::kDim / 4;
    const int thread = static_cast<int>(threadIdx.x) - T::kCopiers - T::kAttenders;
    const ToldLine last = find_part(smem, args, plan, thread < 32);
    Cursor<T::kKeys> turn = smem.part[1], ahead = turn; // ahead: the line whose queries come next
    StageRing lines;
    const auto load_queries = [&] {
        if (ahead.left <= 0) return;
        smem.queries_empty[lines.stage].wait(lines.parity ^ 1);
        T::Copier::load(smem.queries[lines.stage], args, plan, ahead, thread);
        smem.queries_full[lines.stage].arrive_after_copies();
        smem.queries_full[lines.stage].arrive();
        lines.advance(2);
        ahead.advance(args, plan, ahead.of.turns.last - ahead.turn);
    };
    int chunk = 0, first_chunk = 0; // first_chunk: of the line's in this part
    bool is_first = true;
    for (int turns;; turn.advance(args, plan, turns), ++chunk) {
        if (is_first || (turn.left > 0 && turn.begins_line())) {
#pragma unroll 1
            for (int n = is_first ? 2 : 1; n > 0; --n) load_queries();
            if (is_first && thread < 32) {
                announce(plan, turn, last);
                let_dependents_start();
            }
            is_first = false;
            chunk = first_chunk = turn.chunk();
        }
        if (turn.left <= 0) break;
        turns = turn.chunk_turns();
        const int count = turn.rows(plan, T::kRows) * kQuads;
        const bool folds = turn.part_begin == turn.of.turns.first, ends_line = turn.turn + turns == turn.of.turns.last;
        const bool leaves = turn.left <= turns && !ends_line;
        const ToldChunk<Real, T::kDim> told(plan, turn.place, chunk);
        barrier_wait(kSumsFull, T::kAttenders + kFolders);
#pragma unroll 1
        for (int n = thread; n < count; n += kFolders) {
            const int row = n / kQuads, quad = n % kQuads;
            const auto col = [&](int c) { return T::column(quad, c); };
            Part<Real> part = T::part_of(smem.sums, row, quad);
            if (folds) {
                Part<Real> line = chunk == 0 ? Part<Real>::empty() : smem.line[n];
                line.fold(part);
                part = line;
            }
            if (!folds || leaves)
                told.store_part(row, quad, col, part);
            else if (!ends_line)
                smem.line[n] = part;
            else
                store_result(args, turn, QueryRow(plan, turn.head, turn.row0(T::kRows) + row), part, col);
        }
        barrier_arrive(kSumsEmpty, T::kAttenders + kFolders);
        if (folds ? !leaves : turn.left > turns && !ends_line) continue;
        // What this block tells of the line is complete. Once: a release takes as long as all that memory has to do.
        __syncwarp();
        for (int n = (folds ? chunk : first_chunk) + thread % 32; n <= chunk; n += 32)
            add_release(&told_flag(plan, turn.place, n), 1);
    }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads) __maxnreg__(T::kRegisters)
    decode(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    extern __shared__ __align__(1024) unsigned char shared[];
    DecodeSmem<T> &smem = *reinterpret_cast<DecodeSmem<T> *>(shared);

    warm_constants(args, plan);
    if (threadIdx.x < T::kCopiers)
        copy_turns(smem, args, plan);
    else if (threadIdx.x < T::kCopiers + T::kAttenders)
        attend_turns(smem, args, plan);
    else
        fold_chunks(smem, args, plan);
}

#endif
