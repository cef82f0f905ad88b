// Who reads which keys of a cache: the work of decoding, cut into equal parts on the device, where the lengths are.
//
//   row      a query of a head; the rows that share a key/value head (heads_q / heads_kv of each new token) are taken together
//   line     kRows of these rows, with all keys that they see; a sequence has `lines` of them, all equally long
//   turn     kKeys keys of a line, counted from key 0 of the sequence: what a block reads at a time
//   chunk    turns of a line, as many by the sequence's length and the shapes alone, the line's last may have fewer: what one
//            block sums up
//   slot     a turn, or one that the last chunk of a line lacks: work is counted in them
//
// The lines' chunks, one line after the other, are cut into as many parts as there are blocks. A part may end within a line,
// or hold many lines. Which blocks there are changes no result: decode_sum.cuh.
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
    bool has_line_places;              // a line's place is its number, else that of the block that begins it
    int stages;                        // in shared memory
    bool reads_once;                   // keys and values are more than the L2 cache holds
    bool turns_in_pages;               // each turn lies within a page
    bool is_modified;                  // scores by softcap, slopes or tree_mask
    CacheStrides k_strides, v_strides; // where rows are made of 16 bytes, aligned
    void *told; // ToldLine [places], a word for each chunk: [places][line_chunks], ToldChunk alike
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
    __device__ __forceinline__ int count() const { return last - first; }
};

// A chunk has kLeastKeys keys or more, a sequence kMostChunks chunks, and a line of it kMostOfLine, at most, or each line has
// one: so many that one sequence alone keeps a GPU busy, so few that they are merged in no time.
enum { kLeastKeys = 128, kMostChunks = 128, kMostOfLine = 64 };

// What the lines of a sequence share.
template <int kKeys>
struct Sequence {
    fa_cached_sequence seq;
    int lo; // the first key that a row sees
    Turns turns;
    int chunk_turns, chunks; // of a line

    __device__ __forceinline__ void be_of(const fa_kvcache_args &args, const DecodePlan &plan, int length) {
        seq = fa_cached_sequence_of(&args, length);
        lo = static_cast<int>(fa_cached_keys(&args, &seq, 0).lo);
        turns.first = lo / kKeys;
        turns.last = max((seq.len_k + kKeys - 1) / kKeys, turns.first + 1); // at least one, which writes o
        constexpr int kLeastTurns = kLeastKeys > kKeys ? kLeastKeys / kKeys : 1;
        const int count = turns.count();
        const int most = max((count * plan.lines - 1) / kMostChunks, (count - 1) / kMostOfLine) + 1;
        chunk_turns = min(max(most, kLeastTurns), count);
        chunks = (count + chunk_turns - 1) / chunk_turns;
    }
    __device__ __forceinline__ int slots() const { return chunks * chunk_turns; } // of a line
    __device__ __forceinline__ Sequence of_lane(int lane) const {
        const auto of = [&](int x) { return __shfl_sync(~0u, x, lane); };
        return {{of(seq.start), of(seq.len_k)}, of(lo), {of(turns.first), of(turns.last)}, of(chunk_turns), of(chunks)};
    }
};

// A line, and where its slots stand among those of all lines.
template <int kKeys>
struct Line {
    int b, line; // line: of sequence b
    int start;
    Sequence<kKeys> of;
};

// A line that blocks share, by the one that begins it: it has folded the chunks up to first_chunk, which it tells; others
// tell those behind it, each on its own.
struct alignas(16) ToldLine {
    int b, line, first_chunk, chunks; // chunks: none if no line is shared
};
__device__ __forceinline__ ToldLine &told_line(const DecodePlan &plan, int place) {
    return static_cast<ToldLine *>(plan.told)[place];
}
// By another kernel while the one that tells goes on.
__device__ __forceinline__ ToldLine load_told_line(const DecodePlan &plan, int place) {
    const int4 line = __ldcg(reinterpret_cast<const int4 *>(&told_line(plan, place)));
    return {line.x, line.y, line.z, line.w};
}

enum { kFolders = 128 }; // threads that fold and tell chunks

// Of all chunks that can be told.
__host__ __device__ __forceinline__ int64_t nth_told(const DecodePlan &plan, int place, int chunk) {
    return static_cast<int64_t>(place) * plan.line_chunks + chunk;
}
// Whether a chunk has been told: each warp of the folders adds 1.
__device__ __forceinline__ int &told_flag(const DecodePlan &plan, int place, int chunk) {
    return reinterpret_cast<int *>(static_cast<ToldLine *>(plan.told) + plan.places)[nth_told(plan, place, chunk)];
}
// Where the chunks lie, in bytes.
__host__ __device__ __forceinline__ int64_t told_chunks_at(const DecodePlan &plan) {
    return plan.places * static_cast<int64_t>(sizeof(ToldLine)) + (nth_told(plan, plan.places, 0) + 3) / 4 * 16;
}

// Lengths of some sequences as they are now: a lane has kOfLane of them, one behind the other.
struct GivenLengths {
    enum { kOfLane = 4, kCount = 32 * kOfLane };
    int of[kOfLane];

    __device__ __forceinline__ void read(const fa_kvcache_args &args, int b0) {
        const int b = b0 + static_cast<int>(threadIdx.x) % 32 * kOfLane;
#pragma unroll
        for (int n = 0; n < kOfLane; ++n) of[n] = b + n < args.batch ? load_relaxed(args.cache_seqlens + b + n) : 0;
    }
    // Sequence b's, counted from b0. Each lane may ask for its own.
    __device__ __forceinline__ int length(int b) const {
        int length = 0;
#pragma unroll
        for (int n = 0; n < kOfLane; ++n) {
            const int own = __shfl_sync(~0u, of[n], b / kOfLane % 32);
            if (b % kOfLane == n) length = own;
        }
        return length;
    }
    __device__ __forceinline__ bool operator==(const GivenLengths &other) const { // of all lanes
        bool are_equal = true;
#pragma unroll
        for (int n = 0; n < kOfLane; ++n) are_equal &= of[n] == other.of[n];
        return __all_sync(~0u, are_equal);
    }
};

// How the chunks are cut, found out by one warp. What happens once is to be little code: it is read from memory, like the keys.
template <int kKeys>
class Partition {
    const fa_kvcache_args &args;
    const DecodePlan &plan;
    const GivenLengths &given; // of the first sequences: most often all
    // Slots; those of a chunk where all sequences have the same, then no cut needs to be rounded, else 1; units of a part, and
    // how many parts have one more.
    int total, unit, each, rest;

    // Slots of sequences [b0, b0 + kCount).
    enum { kOfLane = GivenLengths::kOfLane, kCount = GivenLengths::kCount };
    struct Slots {
        int of[kOfLane], sum, end; // of all their lines; end: of these and of the lanes before
        int least, most;           // turns of a chunk

        __device__ __forceinline__ Slots() {}
        __device__ __forceinline__ Slots(const fa_kvcache_args &args, const DecodePlan &plan, const GivenLengths &given,
                                         int b0)
            : sum(0), least(INT32_MAX), most(0) {
            const int lane = threadIdx.x % 32, b = b0 + lane * kOfLane;
#pragma unroll
            for (int n = 0; n < kOfLane; ++n) {
                of[n] = 0;
                if (b + n >= args.batch) continue;
                Sequence<kKeys> sequence;
                sequence.be_of(args, plan, given.of[n]);
                of[n] = sequence.slots() * plan.lines;
                sum += of[n], least = min(least, sequence.chunk_turns), most = max(most, sequence.chunk_turns);
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
    Slots first;          // of b0 = 0
    Sequence<kKeys> only; // of one
    __device__ __forceinline__ Slots slots_from(int b0) const {
        GivenLengths lengths;
        lengths.read(args, b0);
        return Slots(args, plan, lengths, b0);
    }
    __device__ __forceinline__ int uncut(int i) const { return (i * each + min(i, rest)) * unit; }

    // The sequence that a slot of all lines belongs to, and the slots before it. Each lane may ask for its own: lanes 0 and 1
    // are answered.
    __device__ __forceinline__ void find(int slot, int &b, int &before) const {
        const int lane = threadIdx.x % 32;
        Slots own = first;
        b = 0, before = 0;
#pragma unroll 1
        for (int b0 = 0, base = 0; args.batch > 1;) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int asked = __shfl_sync(~0u, slot, n) - base;
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
            base += own.total(), b0 += kCount;
            if (b0 >= args.batch) break;
            own = slots_from(b0);
        }
    }

public:
    __device__ __forceinline__ Partition(const fa_kvcache_args &args_, const DecodePlan &plan_,
                                         const GivenLengths &given_)
        : args(args_), plan(plan_), given(given_), total(0), unit(1), each(0), rest(0) {
        if (args.batch == 1) only.be_of(args, plan, given.length(0));
        if (plan.parts_a_line) return;
        if (args.batch == 1) {
            unit = only.chunk_turns, total = only.slots() * plan.lines;
            const int units = only.chunks * plan.lines;
            each = plan.blocks_divisor.quotient(units), rest = units - each * plan.blocks;
            return;
        }
        first = Slots(args, plan, given, 0);
        total = first.total();
        int least = first.least, most = first.most;
#pragma unroll 1
        for (int b0 = kCount; b0 < args.batch; b0 += kCount) {
            const Slots more = slots_from(b0);
            total += more.total(), least = min(least, more.least), most = max(most, more.most);
        }
        least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
        if (least == most) unit = most;
        const int units = total / unit;
        each = plan.blocks_divisor.quotient(units), rest = units - each * plan.blocks;
    }
    // Each lane may ask for its own.
    __device__ __forceinline__ Sequence<kKeys> sequence(int b) const {
        if (args.batch == 1) return only;
        Sequence<kKeys> of;
        const int length = given.length(b);
        of.be_of(args, plan, args.batch > kCount ? load_relaxed(args.cache_seqlens + b) : length);
        return of;
    }

    // The line in which part i begins, or at whose end; of part `blocks`, the last one. Lanes 0 and 1 may ask for two.
    __device__ __forceinline__ Line<kKeys> line_of(int i) const {
        Line<kKeys> line;
        const int slot = min(uncut(i), total - 1);
        if (plan.parts_a_line) {
            const int nth = i / plan.parts_a_line;
            line.b = nth / plan.lines, line.line = nth % plan.lines, line.start = 0;
        } else {
            find(slot, line.b, line.start);
        }
        line.of = sequence(line.b);
        if (plan.parts_a_line) return line;
        line.line = (slot - line.start) / line.of.slots();
        line.start += line.line * line.of.slots();
        return line;
    }

    // The line's first chunk that is not in a part before i: 0 to chunks.
    __device__ __forceinline__ int cut(int i, const Line<kKeys> &line) const {
        const int chunks = line.of.chunks, chunk = line.of.chunk_turns;
        if (plan.parts_a_line) {
            const int nth = min(max(i - (line.b * plan.lines + line.line) * plan.parts_a_line, 0), plan.parts_a_line);
            return static_cast<int>(static_cast<int64_t>(chunks) * nth / plan.parts_a_line);
        }
        if (i >= plan.blocks) return chunks;
        return min((max(uncut(i) - line.start, 0) + chunk / 2) / chunk, chunks);
    }

    // The part that begins a line; parts are equal.
    __device__ __forceinline__ int beginning_part(const Line<kKeys> &line) const {
        const int start = line.start / unit, longer = rest * (each + 1); // units of the parts that have one more
        int part = start < longer ? start / (each + 1) : rest + (start - longer) / each;
        while (cut(part + 1, line) == 0) ++part;
        return part;
    }
};

// A worker's way through its block's part.
template <int kKeys>
struct Cursor {
    Sequence<kKeys> of;
    int b, head, m_block;
    int turn, part_begin; // part_begin: of the line's turns in this part
    int left;             // slots of the part, from this turn on
    int place;            // of the line's chunks, where blocks share it

    // By a whole warp. Returns the line in which the part ends; chunks: 0 if it has all of it, -1 if it does not begin it.
    __device__ __forceinline__ ToldLine find(const fa_kvcache_args &args, const DecodePlan &plan,
                                             const Partition<kKeys> &partition, int part) {
        // Lane 0 looks where this part begins, lane 1 where the next one does. With parts of one line both are in that line.
        const int next = threadIdx.x % 32 == 1;
        const Line<kKeys> line = partition.line_of(plan.parts_a_line ? part : part + next);
        const int cut = partition.cut(part + next, line), at = line.start + cut * line.of.chunk_turns;
        const int begin = __shfl_sync(~0u, at, 0), begin_cut = __shfl_sync(~0u, cut, 0);
        Line<kKeys> own;
        own.b = b = __shfl_sync(~0u, line.b, 0);
        own.line = __shfl_sync(~0u, line.line, 0), own.start = __shfl_sync(~0u, line.start, 0);
        own.of = of = line.of.of_lane(0);
        head = plan.m_blocks.quotient(own.line), m_block = own.line - head * static_cast<int>(plan.m_blocks.value);
        turn = part_begin = min(of.turns.first + begin_cut * of.chunk_turns, of.turns.last);
        left = __shfl_sync(~0u, at, 1) - begin;
        place = part;
        if (plan.has_line_places)
            place = b * plan.lines + own.line;
        else if (left > 0 && begin_cut > 0)
            place = partition.beginning_part(own);
        if (left > 0 && begin_cut == of.chunks) next_line(args, plan, [&] { return partition.sequence(b); });

        const int chunks = cut == 0 || line.start < begin ? -1 : cut < line.of.chunks ? line.of.chunks - cut + 1 : 0;
        return {__shfl_sync(~0u, line.b, 1), __shfl_sync(~0u, line.line, 1), __shfl_sync(~0u, cut, 1) - 1,
                __shfl_sync(~0u, chunks, 1)};
    }
    __device__ __forceinline__ bool begins_line() const { return turn == part_begin; }  // in this block
    __device__ __forceinline__ bool has_new_tokens(const fa_kvcache_args &args) const { // in this turn
        return args.k.data && (turn + 1) * kKeys > of.seq.start;
    }
    // Of a chunk's first turn: the turns of the chunk, and its number.
    __device__ __forceinline__ int chunk_turns() const { return min(of.chunk_turns, of.turns.last - turn); }
    __device__ __forceinline__ int chunk() const { return (turn - of.turns.first) / of.chunk_turns; }
    __device__ __forceinline__ void advance(const fa_kvcache_args &args, const DecodePlan &plan, int turns = 1) {
        left -= turns, turn += turns;
        if (turn < of.turns.last) return;
        left -= of.slots() - of.turns.count();
        if (left > 0)
            next_line(args, plan, [&] {
                Sequence<kKeys> next;
                next.be_of(args, plan, args.cache_seqlens[b]);
                return next;
            });
    }
    // The line's rows, among those of the head.
    __device__ __forceinline__ int row0(int line_rows) const { return m_block * line_rows; }
    __device__ __forceinline__ int rows(const DecodePlan &plan, int line_rows) const {
        return min(plan.rows - row0(line_rows), line_rows);
    }

private:
    template <typename F>
    __device__ __forceinline__ void next_line(const fa_kvcache_args &args, const DecodePlan &plan,
                                              const F &sequence) { // of b
        if (++m_block == static_cast<int>(plan.m_blocks.value)) m_block = 0, ++head;
        if (head == args.heads_kv) {
            head = 0, ++b;
            of = sequence();
        }
        turn = part_begin = of.turns.first;
        place = plan.has_line_places ? place + 1 : static_cast<int>(blockIdx.x);
    }
};

#endif
