// The second kernel of decoding: lines that several blocks have parts of. Block (i, y) looks whether part i is the first to
// begin within a line; if so it folds what the line's blocks have told, from left to right (decode_tree.cuh), for some of
// the rows. What it has to read it finds out while the first kernel runs.
#ifndef FA_DECODE_MERGE_CUH
#define FA_DECODE_MERGE_CUH

#include "cuda/decode_rows.cuh"
#include "cuda/ptx/dependent.cuh"

enum { kMergeThreads = 128, kMergeList = 256, kMergeAtOnce = 4 };

struct MergeItem {
    int block, slot;
    Record record;
};

template <typename Real, int kDim, int kKeys, int kRows>
__global__ void __launch_bounds__(kMergeThreads, 5)
    decode_merge(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    __shared__ MergeItem list[kMergeList];
    __shared__ int counts[2]; // of items in the list; the block to go on with

    const Partition<kKeys> partition(args, plan);
    const int part =
        plan.parts_a_line ? static_cast<int>(blockIdx.x) * plan.parts_a_line : static_cast<int>(blockIdx.x) + 1;
    if (partition.is_empty()) return;
    const Line<kKeys> line = partition.line_of(part);
    const auto cut = [&](int i) { return partition.cut(i, line); };
    if (plan.parts_a_line == 0) { // the first cut within the line?
        const int at = cut(part);
        if (at <= line.turns.first || at >= line.turns.last || cut(part - 1) > line.turns.first) return;
    }
    const int head = plan.m_blocks.quotient(line.line);
    const int row0 = (line.line - head * static_cast<int>(plan.m_blocks.value)) * kRows;
    const int flat = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
    const int row = flat / (kDim / 4), col = flat % (kDim / 4) * 4;
    const bool is_mine = row < kRows && row0 + row < plan.rows;

    Tree<Real, 1> tree;
    bool is_complete = false;
    int block = plan.parts_a_line ? part : part - 1;
    for (bool is_first = true; !is_complete; is_first = false) {
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
                int nth = used + before - count;
                int slot = first_slot(plan, begin > line.turns.first);
                if (fits && !is_whole)
                    for (int at = begin; at < end; at = list[nth++].record.end) list[nth] = {i, slot++, records.at(at)};
                const int fitting = __popc(__ballot_sync(~0u, fits));
                if (fitting > 0) used += __shfl_sync(~0u, before, fitting - 1);
                block += fitting;
                if (fitting < 32 || __shfl_sync(~0u, end, 31) == line.turns.last) break;
            }
            if (threadIdx.x == 0) counts[0] = used, counts[1] = block;
        }
        __syncthreads(); // the list is there
        const int used = counts[0];
        block = counts[1];
        if (is_first) wait_for_prerequisites();
        if (used == 0) return; // one block has the whole line
        for (int n0 = 0; n0 < used && is_mine; n0 += kMergeAtOnce) {
            Part<Real> parts[kMergeAtOnce][1];
#pragma unroll
            for (int n = 0; n < kMergeAtOnce; ++n)
                if (n0 + n < used)
                    parts[n][0] =
                        Slot<Real, kDim>(plan, list[n0 + n].block, list[n0 + n].slot).load_part(plan, row, col);
#pragma unroll
            for (int n = 0; n < kMergeAtOnce; ++n)
                if (n0 + n < used) {
                    const Record record = list[n0 + n].record;
                    const auto push = [&](auto level) {
                        tree.template push<level.value>(parts[n], 1, record.begin, record.end, line.turns,
                                                        line.turns.first, [](const auto &) {});
                    };
                    if (record.level == 0) push(std::integral_constant<int, 0>());
                    if (record.level == 1) push(std::integral_constant<int, 1>());
                    if (record.level == 2) push(std::integral_constant<int, 2>());
                }
        }
        is_complete = list[used - 1].record.end == line.turns.last;
        __syncthreads(); // the list was read
    }
    if (is_mine && col < args.head_dim_v)
        store_result(args, tree.state[kLevels - 1][0], line.b, head, QueryRow(plan, head, row0 + row), col);
}

#endif
