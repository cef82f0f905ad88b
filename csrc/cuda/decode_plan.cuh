// Who reads which keys of a cache: the work of decoding, cut into equal parts on the device, where the lengths are.
//
//   row      a query of a head; the rows that share a key/value head (heads_q / heads_kv of each new token) are taken together
//   line     kRows of these rows, with all keys that they see; a sequence has `lines` of them, all equally long
//   turn     kKeys keys of a line, counted from key 0 of the sequence: what a block reads at a time
//
// The lines' turns, one line after the other, are cut into as many parts as there are blocks. A part may end within a line,
// or hold many lines. Which blocks there are changes no result: decode_tree.cuh.
#ifndef FA_DECODE_PLAN_CUH
#define FA_DECODE_PLAN_CUH

#include "cache.h"
#include "cuda/device.cuh"
#include "cuda/divisor.cuh"

// Of a cache, in 16 bytes.
struct CacheStrides {
    uint32_t page, row;
};

// Made by the host from what it knows: shapes.
struct DecodePlan {
    Divisor page_size, group, m_blocks, blocks_divisor;
    int rows;                          // that share a key/value head
    int lines;                         // of a sequence: heads_kv m_blocks
    int blocks;                        // parts
    int parts_a_line;                  // num_splits; 0: the parts are equal
    int slots, slot_rows;              // places for partial results a block has, and the rows of each
    bool merges_lines;                 // decode_merge's blocks have a line each, not a cut
    bool turns_in_pages;               // each turn lies within a page
    bool is_modified;                  // scores by softcap, slopes or tree_mask
    CacheStrides k_strides, v_strides; // where rows are made of 16 bytes, aligned
    void *partial;                     // [blocks][slots] of PartialRow rows
};

// Reads a word of each line of the parameters, all at once: one after the other, when they are first needed, each would be
// waited for.
__device__ __forceinline__ void warm_constants(const fa_kvcache_args &args, const DecodePlan &plan) {
    constexpr int kLine = 64, kArgs = sizeof(fa_kvcache_args) / kLine + 1, kPlan = sizeof(DecodePlan) / kLine + 1;
    static_assert(kArgs + kPlan <= 32);
    const int lane = threadIdx.x % 32;
    const int at = min(lane * kLine, static_cast<int>(sizeof(fa_kvcache_args)) - 4) / 4;
    asm volatile("" ::"r"(reinterpret_cast<const int *>(&args)[at]));
    const int of_plan = min(lane * kLine, static_cast<int>(sizeof(DecodePlan)) - 4) / 4;
    asm volatile("" ::"r"(reinterpret_cast<const int *>(&plan)[of_plan]));
}

// A line's turns [first, last), counted from key 0.
struct Turns {
    int first, last;
};

// What the lines of a sequence share.
template <int kKeys>
struct Sequence {
    fa_cached_sequence seq;
    int lo; // the first key that a row sees
    Turns turns;

    __device__ __forceinline__ void read(const fa_kvcache_args &args, int b) {
        seq = fa_cached_sequence_at(&args, b);
        lo = static_cast<int>(fa_cached_keys(&args, &seq, 0).lo);
        turns.first = lo / kKeys;
        turns.last = max((seq.len_k + kKeys - 1) / kKeys, turns.first + 1); // at least one, which writes o
    }
    __device__ __forceinline__ int length() const { return turns.last - turns.first; }
};

// A line, and where its turns stand among those of all lines.
struct Line {
    int b, line; // line: of sequence b
    int start;
    Turns turns;

    __device__ __forceinline__ int length() const { return turns.last - turns.first; }
};

// How the turns are cut, found out by one warp. What happens once is to be little code: it is read from memory, like the keys.
template <int kKeys>
class Partition {
    const fa_kvcache_args &args;
    const DecodePlan &plan;
    int total, each, rest; // turns; a part's, and how many parts have one more
    int quantum; // a cut within a line is at a multiple of it, so that parts end where sums of 4 or 16 turns do

    // A lane looks at kOfLane sequences at a time, one behind the other, a warp at 32 times as many.
    enum { kOfLane = 4 };
    struct Lengths {
        int of[kOfLane], sum; // turns of all their lines

        __device__ __forceinline__ Lengths(const fa_kvcache_args &args, const DecodePlan &plan, int b0) : sum(0) {
            const int b = b0 + static_cast<int>(threadIdx.x % 32) * kOfLane;
#pragma unroll
            for (int n = 0; n < kOfLane; ++n) {
                Sequence<kKeys> sequence;
                if (b + n < args.batch) sequence.read(args, b + n);
                of[n] = b + n < args.batch ? sequence.length() * plan.lines : 0;
                sum += of[n];
            }
        }
    };
    __device__ __forceinline__ int uncut(int i) const { return i * each + min(i, rest); }

    // The sequence that a turn of all lines belongs to, and the turns before it. Each lane may ask for its own: lanes 0 and 1
    // are answered.
    __device__ __forceinline__ void find(int turn, int &b, int &before) const {
        const int lane = threadIdx.x % 32;
        b = 0, before = 0;
#pragma unroll 1
        for (int b0 = 0, base = 0; args.batch > 1 && b0 < args.batch; b0 += 32 * kOfLane) {
            const Lengths own(args, plan, b0);
            int end = own.sum;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int left = __shfl_up_sync(~0u, end, step);
                if (lane >= step) end += left;
            }
            end += base;
            base = __shfl_sync(~0u, end, 31);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int asked = __shfl_sync(~0u, turn, n);
                int of_lane = b0 + lane * kOfLane, start = end - own.sum;
                const unsigned behind = __ballot_sync(~0u, start <= asked && end > asked); // one lane, or none
#pragma unroll
                for (int m = 0; m < kOfLane - 1; ++m)
                    if (start + own.of[m] <= asked && of_lane == b0 + lane * kOfLane + m) start += own.of[m], ++of_lane;
                if (behind == 0) continue;
                const int at = __ffs(static_cast<int>(behind)) - 1;
                of_lane = __shfl_sync(~0u, of_lane, at), start = __shfl_sync(~0u, start, at);
                if (lane == n) b = of_lane, before = start;
            }
        }
    }

public:
    __device__ __forceinline__ Partition(const fa_kvcache_args &args_, const DecodePlan &plan_)
        : args(args_), plan(plan_), total(0), each(0), rest(0), quantum(1) {
        if (plan.parts_a_line) return;
        if (args.batch == 1) {
            Sequence<kKeys> only;
            only.read(args, 0);
            total = only.length() * plan.lines;
        } else {
#pragma unroll 1
            for (int b0 = 0; b0 < args.batch; b0 += 32 * kOfLane) total += Lengths(args, plan, b0).sum;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        }
        each = plan.blocks_divisor.quotient(total), rest = total - each * plan.blocks;
        quantum = each >= 12 ? 16 : each > 2 || (each == 2 && 2 * rest > plan.blocks) ? 4 : 1;
    }
    __device__ __forceinline__ bool is_empty() const { return plan.parts_a_line == 0 && total == 0; }

    // The line in which part i begins, or at whose end; of part `blocks`, the last one. Lanes 0 and 1 may ask for two.
    __device__ __forceinline__ Line line_of(int i) const {
        Line line;
        const int turn = min(uncut(i), total - 1);
        if (plan.parts_a_line) {
            const int nth = i / plan.parts_a_line;
            line.b = nth / plan.lines, line.line = nth % plan.lines, line.start = 0;
        } else {
            find(turn, line.b, line.start);
        }
        Sequence<kKeys> of;
        of.read(args, line.b);
        line.turns = of.turns;
        if (plan.parts_a_line) return line;
        line.line = (turn - line.start) / line.length();
        line.start += line.line * line.length();
        return line;
    }

    // Line `nth` of all, the same for all lanes.
    __device__ __forceinline__ Line nth_line(int nth) const {
        Line line = {nth / plan.lines, nth % plan.lines, 0, {0, 0}};
        Sequence<kKeys> of;
        of.read(args, line.b);
        line.turns = of.turns;
        if (plan.parts_a_line) return line;
#pragma unroll 1
        for (int b = static_cast<int>(threadIdx.x % 32); b < line.b; b += 32) {
            Sequence<kKeys> before;
            before.read(args, b);
            line.start += before.length();
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) line.start += __shfl_xor_sync(~0u, line.start, step);
        line.start = line.start * plan.lines + line.line * line.length();
        return line;
    }
    // The part that holds the first turn of a line, before cuts are rounded.
    __device__ __forceinline__ int first_part(const Line &line) const {
        if (plan.parts_a_line) return (line.b * plan.lines + line.line) * plan.parts_a_line;
        const int longer = rest * (each + 1); // turns of the parts that have one more
        return line.start < longer ? line.start / (each + 1) : rest + (line.start - longer) / each;
    }

    // Where part i begins if that is within the line: a turn of it, first to last.
    __device__ __forceinline__ int cut(int i, const Line &line) const {
        int turns = i >= plan.blocks ? line.length() : uncut(i) - line.start;
        if (plan.parts_a_line) {
            const int nth = i - (line.b * plan.lines + line.line) * plan.parts_a_line;
            turns = static_cast<int>(static_cast<int64_t>(line.length()) * min(max(nth, 0), plan.parts_a_line) /
                                     plan.parts_a_line);
        }
        if (turns <= 0) return line.turns.first;
        if (turns >= line.length()) return line.turns.last;
        const int at = (line.turns.first + turns + quantum / 2) & -quantum;
        return min(max(at, line.turns.first), line.turns.last);
    }
};

// A worker's way through its block's part.
template <int kKeys>
struct Cursor {
    Sequence<kKeys> of;
    int b, head, m_block;
    int turn, part_begin; // part_begin: of the line's turns in this part
    int left;             // turns of the part, this one included

    // By a whole warp.
    __device__ __forceinline__ void find(const fa_kvcache_args &args, const DecodePlan &plan, int part) {
        const Partition<kKeys> partition(args, plan);
        left = 0;
        if (partition.is_empty()) return;
        // Lane 0 looks where this part begins, lane 1 where the next one does. With parts of one line both are in that line.
        const int next = threadIdx.x % 32 == 1;
        const Line line = partition.line_of(plan.parts_a_line ? part : part + next);
        const int cut = partition.cut(part + next, line), place = line.start + cut - line.turns.first;
        left = __shfl_sync(~0u, place, 1) - __shfl_sync(~0u, place, 0);
        b = __shfl_sync(~0u, line.b, 0), turn = part_begin = __shfl_sync(~0u, cut, 0);
        const int of_b = __shfl_sync(~0u, line.line, 0);
        if (left <= 0) return;
        of.read(args, b);
        head = plan.m_blocks.quotient(of_b), m_block = of_b - head * static_cast<int>(plan.m_blocks.value);
        if (turn == of.turns.last) next_line(args, plan);
    }
    __device__ __forceinline__ bool begins_line() const { return turn == part_begin; } // in this block
    __device__ __forceinline__ bool ends_line() const { return turn + 1 == of.turns.last; }
    __device__ __forceinline__ void advance(const fa_kvcache_args &args, const DecodePlan &plan) {
        --left;
        if (++turn == of.turns.last && left > 0) next_line(args, plan);
    }
    // The line's rows, among those of the head.
    __device__ __forceinline__ int row0(int line_rows) const { return m_block * line_rows; }
    __device__ __forceinline__ int rows(const DecodePlan &plan, int line_rows) const {
        return min(plan.rows - row0(line_rows), line_rows);
    }

private:
    __device__ __forceinline__ void next_line(const fa_kvcache_args &args, const DecodePlan &plan) {
        if (++m_block == static_cast<int>(plan.m_blocks.value)) m_block = 0, ++head;
        if (head == args.heads_kv) {
            head = 0, ++b;
            of.read(args, b);
        }
        turn = part_begin = of.turns.first;
    }
};

#endif
