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

// Made by the host from what it knows: shapes.
struct DecodePlan {
    Divisor page_size, group, m_blocks, blocks_divisor;
    int rows;             // that share a key/value head
    int lines;            // of a sequence: heads_kv m_blocks
    int blocks;           // parts
    int parts_a_line;     // num_splits; 0: the parts are equal
    int slots, slot_rows; // places for partial results a block has, and the rows of each
    bool is_modified;     // scores by softcap, slopes or tree_mask
    void *partial;        // [blocks][slots] of PartialRow rows
};

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
template <int kKeys>
struct Line {
    int b, line; // line: of sequence b
    int start;
    Turns turns;

    __device__ __forceinline__ int length() const { return turns.last - turns.first; }
};

// How the turns are cut. Every warp makes one for itself, once, and what happens once is to be little code: it is read from
// memory, like the keys.
template <int kKeys>
class Partition {
    const fa_kvcache_args &args;
    const DecodePlan &plan;
    int total, each, rest; // turns; a part's, and how many parts have one more
    int quantum; // a cut within a line is at a multiple of it, so that parts end where sums of 4 or 16 turns do

    // The turns of sequences [b0, b0 + 32), a sequence a lane.
    __device__ __forceinline__ int turns_of_lane(int b0) const {
        const int b = b0 + static_cast<int>(threadIdx.x % 32);
        if (b >= args.batch) return 0;
        Sequence<kKeys> of;
        of.read(args, b);
        return of.length() * plan.lines;
    }
    __device__ __forceinline__ int uncut(int i) const { return i * each + min(i, rest); }

public:
    __device__ __forceinline__ Partition(const fa_kvcache_args &args_, const DecodePlan &plan_)
        : args(args_), plan(plan_), total(0), each(0), rest(0), quantum(1) {
        if (plan.parts_a_line) return;
#pragma unroll 1
        for (int b0 = 0; b0 < args.batch; b0 += 32) total += turns_of_lane(b0);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        each = plan.blocks_divisor.quotient(total), rest = total - each * plan.blocks;
        quantum = each >= 12 ? 16 : each > 2 || (each == 2 && 2 * rest > plan.blocks) ? 4 : 1;
    }

    // The line in which part i begins, or at whose end; of part `blocks`, the last one.
    __device__ __forceinline__ Line<kKeys> line_of(int i) const {
        Line<kKeys> line = {0, 0, 0, {0, 0}};
        const int turn = min(uncut(i), total - 1);
        if (plan.parts_a_line) {
            const int nth = min(i / plan.parts_a_line, plan.lines * static_cast<int>(args.batch) - 1);
            line.b = nth / plan.lines, line.line = nth % plan.lines;
        } else if (args.batch > 1) {
#pragma unroll 1
            for (int b0 = 0;; b0 += 32) {
                const int own = turns_of_lane(b0);
                int end = own;
#pragma unroll
                for (int step = 1; step < 32; step *= 2) {
                    const int before = __shfl_up_sync(~0u, end, step);
                    if (static_cast<int>(threadIdx.x % 32) >= step) end += before;
                }
                const unsigned behind = __ballot_sync(~0u, line.start + end > turn);
                const int lane = behind ? __ffs(static_cast<int>(behind)) - 1 : 31;
                line.start += __shfl_sync(~0u, behind ? end - own : end, lane);
                line.b = b0 + lane;
                if (behind) break;
            }
        }
        Sequence<kKeys> of;
        of.read(args, line.b);
        line.turns = of.turns;
        if (plan.parts_a_line) return line;
        line.line = (turn - line.start) / line.length();
        line.start += line.line * line.length();
        return line;
    }

    // Where part i begins if that is within the line: a turn of it, first to last.
    __device__ __forceinline__ int cut(int i, const Line<kKeys> &line) const {
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
    __device__ __forceinline__ bool is_empty() const { return plan.parts_a_line == 0 && total == 0; }
};

// A worker's way through its block's part.
template <int kKeys>
struct Cursor {
    Sequence<kKeys> of;
    int b, head, m_block;
    int turn, part_begin; // part_begin: of the line's turns in this part
    int left;             // turns of the part, this one included

    __device__ __forceinline__ Cursor(const fa_kvcache_args &args, const DecodePlan &plan, int part) {
        const Partition<kKeys> partition(args, plan);
        int line = 0;
        left = 0;
        if (partition.is_empty()) return;
#pragma unroll 1
        for (int n = 1; n >= 0; --n) { // where the next part begins, then this one
            const Line<kKeys> at = partition.line_of(plan.parts_a_line ? part : part + n);
            const int cut = partition.cut(part + n, at);
            const int global = at.start + cut - at.turns.first;
            left = n ? global : left - global;
            b = at.b, line = at.line, turn = cut;
        }
        if (left <= 0) return;
        of.read(args, b);
        head = plan.m_blocks.quotient(line), m_block = line - head * static_cast<int>(plan.m_blocks.value);
        part_begin = turn;
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
