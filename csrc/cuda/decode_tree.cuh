// Sums over a line's keys whose bits depend on nothing but the line.
//
// What a set of keys contributes to a row is (m, l, O): the largest score, sum of e^(s - m), sum of e^(s - m) v. Two of them
// are folded by bringing both to the larger m, and as that rounds, the order counts. It is fixed, in turns (decode_plan.cuh)
// counted from key 0:
//
//   level 0   a turn
//   level 1   4 turns, folded from left to right
//   level 2   4 of these, from left to right: 16 turns
//   line      all of these, from left to right
//
// (What a window hides is left out.) Blocks share a line by where they are cut, and each tells what it has of the sum: the
// node of a level, where that began before its part, or as much as it has of a node's left end. Whoever reads these from left
// to right folds what one block alone would have folded.
#ifndef FA_DECODE_TREE_CUH
#define FA_DECODE_TREE_CUH

#include "cuda/decode_plan.cuh"

enum { kLevels = 3 };

// Not inlined: where they stood in the code would decide which of their products and sums are fused, and so the bits.
static __device__ __noinline__ double exp2_of(double x) { return exp2(x); }
static __device__ __noinline__ double log2_of(double x) { return log2(x); }
__device__ __forceinline__ float exp2_of(float x) { return ex2_approx(x); }
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fma_of(double a, double b, double c) { return __fma_rn(a, b, c); }

// Some columns of O and their row's m (of scores times log2 e) and l.
template <typename Real, int kColumns = 4>
struct Part {
    Real max, sum, o[kColumns];

    static __device__ __forceinline__ Part empty() { return {-infinity(Real()), 0, {}}; }
    // e^(m - shift), where no key has been seen 0.
    static __device__ __forceinline__ Real shift_of(Real max) { return max == -infinity(Real()) ? 0 : max; }

    __device__ __forceinline__ void fold(const Part &right) {
        const Real most = max > right.max ? max : right.max, shift = shift_of(most);
        const Real own = exp2_of(max - shift), other = exp2_of(right.max - shift);
        sum = fma_of(right.sum, other, product(sum, own));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[c] = fma_of(right.o[c], other, product(o[c], own));
        max = most;
    }
};

// Turns [begin, end): a node of a level, or whole ones from the left end of their parent on.
struct Record {
    int level, begin, end;
};

// The node of level `level + 1` that turn `at` belongs to.
__device__ __forceinline__ Turns parent_of(int level, int at, const Turns &line) {
    if (level == kLevels - 1) return line;
    const int shift = 2 * (level + 1), begin = at >> shift << shift;
    return {max(begin, line.first), min(begin + (1 << shift), line.last)};
}

// What a block that has turns [begin, end) of a line, and not all of it, tells of them: at(begin), then at() of where the
// record before ended.
struct Records {
    Turns line;
    int begin, end;

    __device__ __forceinline__ Record at(int turn) const {
        int level = 0;
        while (level < kLevels - 1) { // as high as nodes begin here and are whole
            const Turns parent = parent_of(level, turn, line);
            if (parent.first != turn || parent.last > end) break;
            ++level;
        }
        const Turns parent = parent_of(level, turn, line);
        if (parent.first == turn) return {level, turn, end >> (2 * level) << (2 * level)}; // whole children
        return {level, turn, level == 0 ? turn + 1 : parent_of(level - 1, turn, line).last};
    }
};

// A thread's own entries of the sums under way, one of each level.
template <typename Real, int kChunks, int kColumns = 4>
struct Tree {
    using Parts = Part<Real, kColumns>[kChunks];
    Parts state[kLevels];

    // Takes turns [begin, end) of a node of kLevel, its first `chunks` parts. tell(kLevel, parts): the node's parent is not all in this block's part,
    // which begins at part_begin. Returns whether the line is complete, in state[kLevels - 1].
    template <int kLevel = 0, typename Tell>
    __device__ __forceinline__ bool push(const Parts &node, int chunks, int begin, int end, const Turns &line,
                                         int part_begin, const Tell &tell) {
        const Turns parent = parent_of(kLevel, begin, line);
        if (parent.first < part_begin) {
            tell(node);
            return false;
        }
#pragma unroll
        for (int e = 0; e < kChunks; ++e) {
            if (e >= chunks) break;
            if (begin == parent.first)
                state[kLevel][e] = node[e];
            else
                state[kLevel][e].fold(node[e]);
        }
        if (end != parent.last) return false;
        if constexpr (kLevel == kLevels - 1)
            return true;
        else
            return push<kLevel + 1>(state[kLevel], chunks, parent.first, parent.last, line, part_begin, tell);
    }

    // Tells the left ends that a part leaves at `end`, within a line.
    template <int kLevel = kLevels - 1, typename Tell>
    __device__ __forceinline__ void leave(int end, const Turns &line, int part_begin, const Tell &tell) const {
        const Turns parent = parent_of(kLevel, end, line);
        const int children_end = end >> (2 * kLevel) << (2 * kLevel);
        if (parent.first >= part_begin && children_end > parent.first) tell(state[kLevel]);
        if constexpr (kLevel > 0) leave<kLevel - 1>(end, line, part_begin, tell);
    }
};

#endif
