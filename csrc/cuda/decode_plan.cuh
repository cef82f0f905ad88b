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
    Divisor page_size, group, m_blocks;
    int rows;              // that share a key/value head
    int lines;             // of a sequence: heads_kv m_blocks
    int blocks;            // parts
    int parts_a_line;      // num_splits; 0: the parts are equal
    int slots, slot_rows;  // places for partial results a block has, and the rows of each
    void *partial;         // [blocks][slots] of PartialRow rows
};

// A line's turns [first, last), counted from key 0.
struct Turns {
    int first, last;
};

template <int kKeys>
__device__ __forceinline__ Turns turns_of(const fa_kvcache_args &args, const fa_cached_sequence &seq) {
    const int lo = static_cast<int>(fa_cached_keys(&args, &seq, 0).lo), len_k = static_cast<int>(seq.len_k);
    const int first = lo / kKeys;
    return {first, max((len_k + kKeys - 1) / kKeys, first + 1)}; // at least one, which writes o
}

// One line, and where its turns stand among those of all lines.
struct Line {
    int b, line; // line: of sequence b
    int64_t start;
    Turns turns;
};

// How the turns are cut. Every warp makes one for itself.
template <int kKeys>
class Partition {
    const fa_kvcache_args &args;
    const DecodePlan &plan;
    int64_t total;
    int quantum; // a cut within a line is at a multiple of it, so that parts end where sums of 4 or 16 turns do

    __device__ Turns turns_at(int64_t b) const {
        const fa_cached_sequence seq = fa_cached_sequence_at(&args, b);
        return turns_of<kKeys>(args, seq);
    }
    // The turns of sequences [b0, b0 + 32), a sequence a lane.
    __device__ int64_t turns_of_lane(int64_t b0) const {
        const int64_t b = b0 + threadIdx.x % 32;
        if (b >= args.batch) return 0;
        const Turns turns = turns_at(b);
        return static_cast<int64_t>(turns.last - turns.first) * plan.lines;
    }
    __device__ int64_t uncut(int i) const { return total * i / plan.blocks; }

public:
    __device__ Partition(const fa_kvcache_args &args_, const DecodePlan &plan_) : args(args_), plan(plan_), total(0) {
        if (plan.parts_a_line) return;
        for (int64_t b0 = 0; b0 < args.batch; b0 += 32) total += turns_of_lane(b0);
        for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        quantum = 2 * total > 25 * static_cast<int64_t>(plan.blocks) ? 16 : 2 * total > 5 * static_cast<int64_t>(plan.blocks) ? 4 : 1;
    }

    // The line that a turn belongs to, 0 <= turn < total.
    __device__ Line line_of(int64_t turn) const {
        Line line = {0, 0, 0, {0, 0}};
        if (args.batch > 1) {
            for (int64_t b0 = 0;; b0 += 32) {
                const int64_t own = turns_of_lane(b0);
                int64_t end = own;
                for (int step = 1; step < 32; step *= 2) {
                    const int64_t before = __shfl_up_sync(~0u, end, step);
                    if (static_cast<int>(threadIdx.x % 32) >= step) end += before;
                }
                const unsigned behind = __ballot_sync(~0u, line.start + end > turn);
                const int lane = behind ? __ffs(static_cast<int>(behind)) - 1 : 31;
                line.start += __shfl_sync(~0u, behind ? end - own : end, lane);
                if (behind) {
                    line.b = static_cast<int>(b0) + lane;
                    break;
                }
            }
        }
        line.turns = turns_at(line.b);
        const int length = line.turns.last - line.turns.first;
        line.line = static_cast<int>((turn - line.start) / length);
        line.start += static_cast<int64_t>(line.line) * length;
        return line;
    }

    // Where part i begins if that is within the line: a turn of it, first to last.
    __device__ int cut(int i, const Line &line) const {
        const int length = line.turns.last - line.turns.first;
        if (plan.parts_a_line) {
            const int nth = i - (line.b * plan.lines + line.line) * plan.parts_a_line;
            return line.turns.first +
                   static_cast<int>(static_cast<int64_t>(length) * fa_clamp(nth, 0, plan.parts_a_line) / plan.parts_a_line);
        }
        if (i >= plan.blocks) return line.turns.last;
        const int64_t at = line.turns.first + fa_clamp(uncut(i) - line.start, 0, length);
        if (uncut(i) < line.start) return line.turns.first;
        if (uncut(i) >= line.start + length) return line.turns.last;
        return static_cast<int>(fa_clamp((at + quantum / 2) / quantum * quantum, line.turns.first, line.turns.last));
    }

    // The line in which part i begins; false: there is none.
    __device__ bool line_of_part(int i, Line &line) const {
        if (plan.parts_a_line) {
            const int nth = i / plan.parts_a_line;
            line.b = nth / plan.lines, line.line = nth % plan.lines, line.start = 0;
            line.turns = turns_at(line.b);
            return true;
        }
        if (i >= plan.blocks || total == 0) return false;
        line = line_of(uncut(i));
        return true;
    }

    // The turns of part i, from `line`, in which it begins (or at whose end), on.
    __device__ int64_t length(int i, const Line &line, int begin) const {
        if (plan.parts_a_line) return cut(i + 1, line) - begin;
        int64_t end = total;
        if (i + 1 < plan.blocks) {
            const Line last = line_of(uncut(i + 1));
            end = last.start + cut(i + 1, last) - last.turns.first;
        }
        return end - (line.start + begin - line.turns.first);
    }
};

// A block's way through its part.
template <int kKeys>
struct Cursor {
    int b, line; // of the sequence
    fa_cached_sequence seq;
    Turns turns;
    int turn;
    int64_t left; // turns of the part, this one included

    __device__ Cursor(const fa_kvcache_args &args, const DecodePlan &plan, int part) {
        const Partition<kKeys> partition(args, plan);
        Line at;
        left = 0;
        if (!partition.line_of_part(part, at)) return;
        b = at.b, line = at.line, turns = at.turns, turn = partition.cut(part, at);
        left = partition.length(part, at, turn);
        if (left == 0) return;
        seq = fa_cached_sequence_at(&args, b);
        if (turn == turns.last) next_line(args, plan);
    }
    __device__ __forceinline__ void next_line(const fa_kvcache_args &args, const DecodePlan &plan) {
        if (++line == plan.lines) {
            line = 0, ++b;
            seq = fa_cached_sequence_at(&args, b);
            turns = turns_of<kKeys>(args, seq);
        }
        turn = turns.first;
    }
    __device__ __forceinline__ void advance(const fa_kvcache_args &args, const DecodePlan &plan) {
        --left;
        if (++turn == turns.last && left > 0) next_line(args, plan);
    }
    __device__ __forceinline__ int head(const DecodePlan &plan) const { return plan.m_blocks.quotient(line); }
    __device__ __forceinline__ int row0(const DecodePlan &plan, int line_rows) const { // among those of the head
        return (line - head(plan) * static_cast<int>(plan.m_blocks.value)) * line_rows;
    }
    __device__ __forceinline__ int end() const { // of the part, in this line
        return static_cast<int>(fa_min(turns.last, turn + left));
    }
};

#endif
