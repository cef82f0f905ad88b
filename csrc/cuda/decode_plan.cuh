// Who reads which keys of a cache: the work of decoding, cut into equal parts on the device, where the lengths are.
//
//   row      a query of a head; the rows that share a key/value head (heads_q / heads_kv of each new token) are taken together
//   line     kRows of these rows, with all keys that they see; a sequence has `lines` of them, all equally long
//   turn     kKeys keys of a line, counted from key 0 of the sequence: what a block reads at a time
//   chunk    turns of a line, a power of two of them by the sequence's length and the shapes: what one block sums up
//
// The lines' turns, one line after the other, are cut into as many parts as there are blocks, between chunks. A part may end
// within a line, or hold many lines. Which blocks there are changes no result: decode_sum.cuh.
#ifndef FA_DECODE_PLAN_CUH
#define FA_DECODE_PLAN_CUH

#include "cache.h"
#include "cuda/device.cuh"
#include "cuda/divisor.cuh"
#include "cuda/ptx/sync.cuh"

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
    int line_chunks, chunk_rows;       // most chunks of a line; rows of each
    int places;                        // where lines that blocks share are told: decode_merge has a block for each
    bool merges_lines;                 // each line has such a place, not each block, for the last line that it begins
    int stages;                        // in shared memory
    bool reads_once;                   // keys and values are more than the L2 cache holds
    bool turns_in_pages;               // each turn lies within a page
    bool is_modified;                  // scores by softcap, slopes or tree_mask
    CacheStrides k_strides, v_strides; // where rows are made of 16 bytes, aligned
    void *told;                        // [places] of ToldLine, then [places][line_chunks] of ToldChunk
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

// A chunk has kLeastKeys keys, or more turns than that takes. A sequence has kMostChunks chunks, and a line of it kMostOfLine,
// at most, or one more at an end that is not aligned: so many that one sequence alone keeps a GPU busy, so few that they are
// merged in no time.
enum { kLeastKeys = 128, kMostChunks = 128, kMostOfLine = 64 };

// What the lines of a sequence share.
template <int kKeys>
struct Sequence {
    fa_cached_sequence seq;
    int lo; // the first key that a row sees
    Turns turns;

    __device__ __forceinline__ void read(const fa_kvcache_args &args, int b) { be_of(args, args.cache_seqlens[b]); }
    __device__ __forceinline__ void be_of(const fa_kvcache_args &args, int length) {
        seq = fa_cached_sequence_of(&args, length);
        lo = static_cast<int>(fa_cached_keys(&args, &seq, 0).lo);
        turns.first = lo / kKeys;
        turns.last = max((seq.len_k + kKeys - 1) / kKeys, turns.first + 1); // at least one, which writes o
    }
    __device__ __forceinline__ int length() const { return turns.last - turns.first; }
    // A chunk's turns are 2^shift.
    __device__ __forceinline__ int chunk_shift(const DecodePlan &plan) const {
        constexpr int kLeastTurns = kLeastKeys / kKeys;
        static_assert(kLeastTurns * kKeys == kLeastKeys);
        const int beyond = max((length() * plan.lines - 1) / kMostChunks, (length() - 1) / kMostOfLine);
        return 32 - __clz(max(beyond, kLeastTurns - 1));
    }
};

// The chunk that a turn is of, counted from the line's first.
__device__ __forceinline__ int chunk_of(int turn, const Turns &line, int chunk_shift) {
    return (turn >> chunk_shift) - (line.first >> chunk_shift);
}

// A line, and where its turns stand among those of all lines.
struct Line {
    int b, line; // line: of sequence b
    int start;
    Turns turns;
    int chunk_shift;

    template <int kKeys>
    __device__ __forceinline__ void be_of(const Sequence<kKeys> &of, const DecodePlan &plan) {
        turns = of.turns, chunk_shift = of.chunk_shift(plan);
    }
    __device__ __forceinline__ int length() const { return turns.last - turns.first; }
};

// A line that blocks share, by the one that begins it: it has folded the chunks up to first_chunk, others tell those behind
// it, each on its own.
struct alignas(16) ToldLine {
    int b, line, first_chunk, chunks;
};
__device__ __forceinline__ ToldLine &told_line(const DecodePlan &plan, int place) {
    return static_cast<ToldLine *>(plan.told)[place];
}

// How the turns are cut, found out by one warp. What happens once is to be little code: it is read from memory, like the keys.
template <int kKeys>
class Partition {
    const fa_kvcache_args &args;
    const DecodePlan &plan;
    int total, each, rest; // turns; a part's, and how many parts have one more

    // Sequences [b0, b0 + 32 kOfLane): a lane has kOfLane of them, one behind the other.
    enum { kOfLane = 4 };
    struct Lengths {
        int of[kOfLane], sum, end; // turns of all their lines; end: of these and of the lanes before

        __device__ __forceinline__ Lengths() {}
        __device__ __forceinline__ Lengths(const fa_kvcache_args &args, const DecodePlan &plan, int b0) : sum(0) {
            const int lane = threadIdx.x % 32, b = b0 + lane * kOfLane;
#pragma unroll
            for (int n = 0; n < kOfLane; ++n) {
                Sequence<kKeys> sequence;
                if (b + n < args.batch) sequence.read(args, b + n);
                of[n] = b + n < args.batch ? sequence.length() * plan.lines : 0;
                sum += of[n];
            }
            end = sum;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int left = __shfl_up_sync(~0u, end, step);
                if (lane >= step) end += left;
            }
        }
        __device__ __forceinline__ int total() const { return __shfl_sync(~0u, end, 31); }
    };
    Lengths first;        // of b0 = 0: most often all
    Sequence<kKeys> only; // of one sequence; its length as the kernels before have left it, whoever waits for these
    __device__ __forceinline__ int uncut(int i) const { return i * each + min(i, rest); }

    // The sequence that a turn of all lines belongs to, and the turns before it. Each lane may ask for its own: lanes 0 and 1
    // are answered.
    __device__ __forceinline__ void find(int turn, int &b, int &before) const {
        const int lane = threadIdx.x % 32;
        Lengths own = first;
        b = 0, before = 0;
#pragma unroll 1
        for (int b0 = 0, base = 0; args.batch > 1;) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int asked = __shfl_sync(~0u, turn, n) - base;
                int of_lane = b0 + lane * kOfLane, start = own.end - own.sum;
                const unsigned behind = __ballot_sync(~0u, start <= asked && own.end > asked); // one lane, or none
#pragma unroll
                for (int m = 0; m < kOfLane - 1; ++m)
                    if (start + own.of[m] <= asked && of_lane == b0 + lane * kOfLane + m) start += own.of[m], ++of_lane;
                if (behind == 0) continue;
                const int at = __ffs(static_cast<int>(behind)) - 1;
                of_lane = __shfl_sync(~0u, of_lane, at), start = __shfl_sync(~0u, start, at);
                if (lane == n) b = of_lane, before = base + start;
            }
            base += own.total(), b0 += 32 * kOfLane;
            if (b0 >= args.batch) break;
            own = Lengths(args, plan, b0);
        }
    }

public:
    __device__ __forceinline__ Partition(const fa_kvcache_args &args_, const DecodePlan &plan_)
        : args(args_), plan(plan_), total(0), each(0), rest(0) {
        if (args.batch == 1) only.be_of(args, load_relaxed(args.cache_seqlens));
        if (plan.parts_a_line) return;
        if (args.batch == 1) {
            total = only.length() * plan.lines;
        } else {
            first = Lengths(args, plan, 0);
            total = first.total();
#pragma unroll 1
            for (int b0 = 32 * kOfLane; b0 < args.batch; b0 += 32 * kOfLane) total += Lengths(args, plan, b0).total();
        }
        each = plan.blocks_divisor.quotient(total), rest = total - each * plan.blocks;
    }
    __device__ __forceinline__ Sequence<kKeys> sequence(int b) const {
        Sequence<kKeys> of = only;
        if (args.batch > 1) of.read(args, b);
        return of;
    }

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
        line.be_of(sequence(line.b), plan);
        if (plan.parts_a_line) return line;
        line.line = (turn - line.start) / line.length();
        line.start += line.line * line.length();
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
        const int chunk = 1 << line.chunk_shift, at = (line.turns.first + turns + chunk / 2) & -chunk;
        return min(max(at, line.turns.first), line.turns.last);
    }

    // The part that begins a line.
    __device__ __forceinline__ int beginning_part(const Line &line) const {
        int part = first_part(line);
        while (cut(part + 1, line) <= line.turns.first) ++part;
        return part;
    }

    // Line `nth` of the only sequence, as the block that begins it tells of it.
    __device__ __forceinline__ ToldLine only_line(int nth) const {
        const Line line = {0, nth, nth * only.length(), only.turns, only.chunk_shift(plan)};
        const int end = cut(beginning_part(line) + 1, line), told = chunk_of(end - 1, line.turns, line.chunk_shift);
        const int last = chunk_of(line.turns.last - 1, line.turns, line.chunk_shift);
        return {0, nth, told, end < line.turns.last ? last - told + 1 : 0};
    }
};

// A worker's way through its block's part.
template <int kKeys>
struct Cursor {
    Sequence<kKeys> of;
    int b, head, m_block, chunk_shift;
    int turn, part_begin; // part_begin: of the line's turns in this part
    int left;             // turns of the part, this one included
    int place;            // of the line's chunks, where blocks share it

    // By a whole warp.
    __device__ __forceinline__ void find(const fa_kvcache_args &args, const DecodePlan &plan, int part) {
        const Partition<kKeys> partition(args, plan);
        // Lane 0 looks where this part begins, lane 1 where the next one does. With parts of one line both are in that line.
        const int next = threadIdx.x % 32 == 1;
        const Line line = partition.line_of(plan.parts_a_line ? part : part + next);
        const int cut = partition.cut(part + next, line), at = line.start + cut - line.turns.first;
        left = __shfl_sync(~0u, at, 1) - __shfl_sync(~0u, at, 0);
        b = __shfl_sync(~0u, line.b, 0), turn = part_begin = __shfl_sync(~0u, cut, 0);
        const int of_b = __shfl_sync(~0u, line.line, 0);
        const int start = __shfl_sync(~0u, line.start, 0);
        if (left <= 0) return;
        of = partition.sequence(b);
        chunk_shift = of.chunk_shift(plan);
        head = plan.m_blocks.quotient(of_b), m_block = of_b - head * static_cast<int>(plan.m_blocks.value);
        place = plan.merges_lines        ? b * plan.lines + of_b
                : turn == of.turns.first ? part
                                         : partition.beginning_part({b, of_b, start, of.turns, chunk_shift});
        if (turn == of.turns.last) next_line(args, plan);
    }
    __device__ __forceinline__ bool begins_line() const { return turn == part_begin; } // in this block
    // From this turn to the end of its chunk: the part has all of them.
    __device__ __forceinline__ int chunk_turns() const {
        return min((turn | ((1 << chunk_shift) - 1)) + 1, of.turns.last) - turn;
    }
    __device__ __forceinline__ int chunk() const { return chunk_of(turn, of.turns, chunk_shift); }
    __device__ __forceinline__ int last_chunk() const { return chunk_of(of.turns.last - 1, of.turns, chunk_shift); }
    __device__ __forceinline__ void advance(const fa_kvcache_args &args, const DecodePlan &plan, int turns = 1) {
        left -= turns, turn += turns;
        if (turn == of.turns.last && left > 0) next_line(args, plan);
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
            chunk_shift = of.chunk_shift(plan);
        }
        turn = part_begin = of.turns.first;
        place = plan.merges_lines ? place + 1 : static_cast<int>(blockIdx.x);
    }
};

#endif
