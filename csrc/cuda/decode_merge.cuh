// The second kernel of decoding: lines that several blocks have parts of. A block has a line, or, where there are more lines
// than cuts, the line that a cut is the first within; it folds what the line's blocks have told, from left to right
// (decode_tree.cuh), for some rows and columns: a thread has one. What it has to read it finds out while the first kernel runs.
#ifndef FA_DECODE_MERGE_CUH
#define FA_DECODE_MERGE_CUH

#include "cuda/decode_rows.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent.cuh"

enum { kMergeThreads = 128, kMergeList = 256, kMergeAtOnce = 16, kRun = 4 };

// A record to be folded, and all that folding it takes, so that little is left to do when it can be read.
struct MergeItem {
    const void *slot;
    int end;
    int level;       // it is turns of a node of this level + 1
    int run;         // of this item and those behind it that belong to the same node, kRun at most: taken together
    unsigned begins; // bit n: it is, or begins, the left end of a node of level + 1 + n
    unsigned ends;   // bit n: so for the right end
};

// The siblings told[0 ... count), from left to right, folded into `state`, or if they begin their parent into nothing. What
// depends on the largest score so far alone is found out for all of them first.
template <typename Real>
__device__ __forceinline__ void fold_run(Part<Real, 1> &state, bool begins, const Part<Real, 1> (&told)[kRun],
                                         int count) {
    Real most[kRun + 1], own[kRun], other[kRun];
    most[0] = begins ? -infinity(Real()) : state.max;
    Real sum = begins ? Real(0) : state.sum, o = begins ? Real(0) : state.o[0];
#pragma unroll
    for (int n = 0; n < kRun; ++n) most[n + 1] = n >= count || most[n] > told[n].max ? most[n] : told[n].max;
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        const Real shift = Part<Real, 1>::shift_of(most[n + 1]);
        own[n] = exp2_of(most[n] - shift), other[n] = exp2_of(told[n].max - shift);
    }
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        if (n >= count) break;
        if (n == 0 && begins) {
            sum = told[0].sum, o = told[0].o[0]; // as it is: e^0 times it
            continue;
        }
        sum = fma_of(told[n].sum, other[n], product(sum, own[n]));
        o = fma_of(told[n].o[0], other[n], product(o, own[n]));
    }
    state = {most[kRun], sum, {o}};
}

__device__ __forceinline__ MergeItem item_of(const Record &record, const Turns &line, const void *slot) {
    MergeItem item = {slot, record.end, record.level, 1, 0, 0};
    int begin = record.begin, end = record.end;
#pragma unroll 1
    for (int level = record.level; level < kLevels; ++level) {
        const Turns parent = parent_of(level, begin, line);
        item.begins |= (begin == parent.first) << (level - record.level);
        item.ends |= (end == parent.last) << (level - record.level);
        begin = parent.first, end = parent.last;
    }
    return item;
}

// Marks runs: by one warp.
__device__ __forceinline__ void find_runs(MergeItem *list, int used) {
    for (int n0 = 0; n0 < used; n0 += 32) {
        const int n = n0 + static_cast<int>(threadIdx.x % 32);
        const bool is_there = n < used;
        // A new parent: where one begins, or the level is another, or the record before ended its own.
        const bool is_new = !is_there || n == n0 || (list[n].begins & 1) || list[n].level != list[n - 1].level ||
                            (list[n - 1].ends & 1);
        const unsigned starts = __ballot_sync(~0u, is_new);
        const int lane = threadIdx.x % 32, of_start = 31 - __clz(static_cast<int>(starts & (~0u >> (31 - lane))));
        const unsigned later = lane == 31 ? 0 : starts >> (lane + 1);
        const int to_next = later ? __ffs(static_cast<int>(later)) : 32 - lane;
        const int of_run = (lane - of_start) % kRun; // runs of kRun from the parent's first on
        if (is_there) list[n].run = min(min(to_next, used - n), kRun - of_run);
        __syncwarp();
    }
}

template <typename Real, int kDim, int kKeys, int kRows>
__global__ void __launch_bounds__(kMergeThreads, sizeof(Real) == 8 ? 4 : 8)
    decode_merge(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    constexpr int kAcross = kDim < kMergeThreads ? kDim : kMergeThreads, kRowsAtOnce = kMergeThreads / kAcross;
    __shared__ MergeItem list[kMergeList];
    __shared__ int counts[2]; // of items in the list; the block to go on with
    __shared__ alignas(16) Real told[kMergeAtOnce][kMergeThreads], of_rows[kMergeAtOnce][kRowsAtOnce][4];

    warm_constants(args, plan);
    const Partition<kKeys> partition(args, plan); // every warp's own
    if (partition.is_empty()) return wait_for_prerequisites();
    Line line;
    if (plan.merges_lines) {
        line = partition.nth_line(static_cast<int>(blockIdx.x));
    } else {
        line = partition.line_of(static_cast<int>(blockIdx.x) + 1);
        for (int *field : {&line.b, &line.line, &line.start, &line.turns.first, &line.turns.last})
            *field = __shfl_sync(~0u, *field, 0);
        // The first cut within the line?
        const int at = partition.cut(static_cast<int>(blockIdx.x + threadIdx.x % 2), line);
        const int before = __shfl_sync(~0u, at, 0), own = __shfl_sync(~0u, at, 1);
        if (own <= line.turns.first || own >= line.turns.last || before > line.turns.first)
            return wait_for_prerequisites();
    }
    const auto cut = [&](int i) { return partition.cut(i, line); };
    const int head = plan.m_blocks.quotient(line.line);
    const int row0 = (line.line - head * static_cast<int>(plan.m_blocks.value)) * kRows;
    const int flat = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
    const int row = flat / kDim, col = flat % kDim;

    Part<Real, 1> state[kLevels]; // this thread's own
    int block = partition.first_part(line);
    for (bool is_first = true, is_complete = false; !is_complete; is_first = false) {
        if (threadIdx.x < 32) { // a lane looks at a block; those whose records the list has no room for come again
            int used = 0;
            for (;;) {
                const int i = block + static_cast<int>(threadIdx.x);
                const int begin = cut(i), end = cut(i + 1);
                int count = 0;
                const Records records = {line.turns, begin, end};
                const bool is_whole = begin == line.turns.first && end == line.turns.last;
                if (!is_whole)
                    for (int at = begin; at < end; at = records.at(at).end) ++count;
                int before = count;
                for (int step = 1; step < 32; step *= 2) {
                    const int other = __shfl_up_sync(~0u, before, step);
                    if (static_cast<int>(threadIdx.x) >= step) before += other;
                }
                const bool fits = used + before <= kMergeList;
                if (fits && !is_whole) {
                    int nth = used + before - count, slot = first_slot(plan, begin > line.turns.first);
                    for (int at = begin; at < end; at = list[nth++].end)
                        list[nth] = item_of(records.at(at), line.turns, Slot<Real, kDim>(plan, i, slot++).rows);
                }
                const int fitting = __popc(__ballot_sync(~0u, fits));
                if (fitting > 0) used += __shfl_sync(~0u, before, fitting - 1);
                block += fitting;
                if (fitting < 32 || __shfl_sync(~0u, end, 31) == line.turns.last) break;
            }
            __syncwarp();
            find_runs(list, used);
            if (threadIdx.x == 0) counts[0] = used, counts[1] = block;
        }
        __syncthreads(); // the list is there
        const int used = counts[0];
        block = counts[1];
        is_complete = used == 0 || list[used - 1].end == line.turns.last; // before the list is made again
        if (used == 0) return wait_for_prerequisites();                   // one block has the whole line
        if (is_first) wait_for_prerequisites();
        for (int n0 = 0; n0 < used; n0 += kMergeAtOnce) {
            const MergeItem *const items = list + n0;
            const int count = min(used - n0, static_cast<int>(kMergeAtOnce));
            // Some threads copy a record's share of this block, 16 bytes each, and its rows' m and l.
            constexpr int kCopiers = kMergeThreads / kVec<Real>;
            const int piece = static_cast<int>(threadIdx.x) % kCopiers * kVec<Real>;
            const int first = static_cast<int>(blockIdx.y) * kMergeThreads + piece;
            for (int n = static_cast<int>(threadIdx.x) / kCopiers; n < count; n += kVec<Real>) {
                if (first / kDim >= min(plan.slot_rows, plan.rows - row0)) break;
                const auto *rows = static_cast<const Real *>(items[n].slot);
                cp_async_16(&told[n][piece], rows + first, true);
                if (piece % kAcross == 0)
#pragma unroll
                    for (int c = 0; c < 4; c += kVec<Real>)
                        cp_async_16(&of_rows[n][piece / kAcross][c],
                                    rows + plan.slot_rows * kDim + first / kDim * 4 + c, true);
            }
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads(); // they are there
            for (int n = 0; n < count;) {
                const MergeItem item = items[n];
                const int run = min(item.run, count - n);
                Part<Real, 1> parts[kRun];
#pragma unroll
                for (int m = 0; m < kRun; ++m) {
                    const Real *of_row = of_rows[min(n + m, kMergeAtOnce - 1)][threadIdx.x / kAcross];
                    parts[m] = {of_row[0], of_row[1], {told[min(n + m, kMergeAtOnce - 1)][threadIdx.x]}};
                }
                const unsigned ends = items[n + run - 1].ends;
#pragma unroll
                for (int level = 0; level < kLevels; ++level)
                    if (level == item.level) fold_run(state[level], item.begins & 1, parts, run);
#pragma unroll
                for (int level = 1; level < kLevels;
                     ++level) { // a node that is complete is a child of the next level's
                    const int above = level - item.level;
                    if (above <= 0 || (ends & ((1u << above) - 1)) != (1u << above) - 1) continue;
                    if (item.begins >> above & 1)
                        state[level] = state[level - 1];
                    else
                        state[level].fold(state[level - 1]);
                }
                n += run;
            }
            __syncthreads(); // they were read
        }
    }
    if (row < plan.rows - row0 && row < plan.slot_rows && col < args.head_dim_v)
        store_result(args, state[kLevels - 1], line.b, head, QueryRow(plan, head, row0 + row), col);
}

#endif
