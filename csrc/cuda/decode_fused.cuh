// Decoding on CUDA cores: every dtype, head_dim, stride and alignment, in float32 or, for float64, in float64.
//
// The rows of a turn's K and V lie in shared memory as Real. The attenders go through a turn in three steps, which the scores
// in shared memory join:
//
//   scores    kSplit threads a key, each with every kSplit-th 16 bytes of its row: q.k of 8 rows; their sums go round in
//             shuffles, of which each halves the rows that a thread has  -> p
//   softmax   kRowLanes threads a row, which keep the chunk's m and l: scale, softcap, slope, masks | m | p = e^(s - m) | l
//             -> p, and what the sums before are times -> factor
//   values    teams of kDim / 4 threads, four columns each, which keep the chunk's O of kTeamRows rows: O = factor O + p V
//             of some of the keys
//
//   p | barrier | p, factor | barrier | O | barrier
//
// Teams that are not needed for rows share the keys of the others: `groups` of rows, kTeams / groups teams each, whose sums
// part_of adds. How many there are follows from the line's rows alone, and so do all bits.
//
// Copiers (decode_fused_copier.cuh) copy where the cache is of Real in aligned 16 bytes, and otherwise load and convert.
#ifndef FA_DECODE_FUSED_CUH
#define FA_DECODE_FUSED_CUH

#include "cuda/decode.cuh"
#include "cuda/decode_fused_copier.cuh"

// Sums of kCount values over kLanes neighbours. Lane n gets those of kCount / kLanes values, from n kCount / kLanes on; where
// there are more lanes than values, lanes / values neighbours get the same one.
template <int kCount, int kLanes, typename Real>
__device__ __forceinline__ void scatter_sums(Real (&x)[kCount], int lane) {
    int count = kCount;
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        if (count == 1) {
            x[0] += __shfl_xor_sync(~0u, x[0], step);
            continue;
        }
        count /= 2;
        const bool is_upper = lane & step;
#pragma unroll
        for (int n = 0; n < kCount / 2; ++n) {
            if (n >= count) break;
            const Real kept = is_upper ? x[n + count] : x[n], sent = is_upper ? x[n] : x[n + count];
            x[n] = kept + __shfl_xor_sync(~0u, sent, step);
        }
    }
}

template <typename Real_, int kDim_, int kRows_>
struct FusedDecode {
    using Real = Real_;
    static constexpr bool kIsDouble = sizeof(Real) == 8;
    static constexpr int kDim = kDim_, kRows = kRows_;
    static constexpr int kKeys = 16 * 1024 / (kDim * sizeof(Real)); // K and V of a stage: 16 KiB each
    static constexpr int kCopiers = 128, kAttenders = kDim > 128 || kIsDouble ? 128 : 256; // threads
    static constexpr bool kLooksAhead = false, kLeavesRoom = false; // for pages, for decode_merge: registers are few
    static constexpr int kThreads = kCopiers + kAttenders + kFolders;
    static constexpr int kRegisters = 64 * 1024 / kThreads / 8 * 8;       // a thread's
    static constexpr int kQuads = kDim / 4, kTeams = kAttenders / kQuads; // of attenders, four columns each
    static constexpr int kLeastTeamRows = kRows / kTeams > 4 ? kRows / kTeams : 4;
    static constexpr int kTeamRows = kLeastTeamRows < kRows ? kLeastTeamRows : kRows;
    static_assert(kTeams * kTeamRows >= kRows && kKeys % (4 * kTeams) == 0);

    struct Stage {
        alignas(16) Real k[kKeys][kDim], v[kKeys][kDim];
    };
    struct Queries {
        alignas(16) Real x[kRows][kDim];
    };
    struct Sums {
        alignas(16) Real o[kTeams][kTeamRows][kDim];
        alignas(16) Real p[kRows][kKeys + kVec<Real>]; // scores, then e^(s - m); rows apart from each other's banks
        Real factor[kRows];                            // of the sums before this turn
        Real of_row[kRows][2];                         // m, l
        int groups;
    };
    using Copier = FusedCopier<FusedDecode>;

    struct Attender {
        static constexpr int kSplit = kAttenders / kKeys;           // threads a key, neighbours
        static constexpr int kSteps = kDim / (kSplit * kVec<Real>); // 16 bytes of K a thread has
        static constexpr int kGroup = kRows < 8 ? kRows : 8;        // rows whose scores are made together
        static constexpr int kRowLanes = kKeys < 32 ? kKeys : 32;   // threads a row in softmax
        static constexpr int kOfLane = kKeys / kRowLanes;           // keys each
        static constexpr int kRowsAtOnce = kAttenders / kRowLanes;  // in softmax
        static constexpr int kPasses = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
        static_assert(kSplit <= 32 && kSplit * kKeys == kAttenders && kSteps * kSplit * kVec<Real> == kDim);

        int lo[kPasses], hi[kPasses], rows;    // keys that this thread's rows in softmax see; rows of the line
        Real unit;                             // what a product is times in scores
        Real max_of[kPasses], sum_of[kPasses]; // m, l of this thread's rows in softmax
        Real acc_o[kTeamRows][4];              // O of its rows in values

        static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) - kCopiers; }
        static __device__ __forceinline__ int softmax_row(int pass) {
            return thread() / kRowLanes + pass * kRowsAtOnce;
        }

        __device__ __forceinline__ void begin_line(const fa_kvcache_args &args, const DecodePlan &plan,
                                                   const Cursor<kKeys> &turn) {
            rows = turn.rows(plan, kRows);
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const fa_interval keys = fa_cached_keys(&args, &turn.of.seq, query_of(plan, turn, pass).i);
                lo[pass] = static_cast<int>(keys.lo), hi[pass] = static_cast<int>(keys.hi);
            }
            unit = static_cast<Real>(args.softmax_scale) * descale_of(args.k_descale, turn.b, turn.head);
            if (!plan.is_modified) unit *= kLog2E;
        }

        __device__ __forceinline__ void begin_chunk() {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) max_of[pass] = -infinity(Real()), sum_of[pass] = 0;
#pragma unroll
            for (int r = 0; r < kTeamRows; ++r)
#pragma unroll
                for (int n = 0; n < 4; ++n) acc_o[r][n] = 0;
        }

        __device__ __forceinline__ void attend(Stage &stage, Queries &queries, const fa_kvcache_args &args,
                                               const DecodePlan &plan, const Cursor<kKeys> &turn, int turn_at,
                                               Sums &sums) {
#pragma unroll 1
            for (int row0 = 0; row0 < rows; row0 += kGroup) {
                if (kGroup > 4 && rows - row0 <= 4)
                    make_scores < kGroup<4 ? kGroup : 4>(stage, queries, sums, row0);
                else
                    make_scores<kGroup>(stage, queries, sums, row0);
            }
            barrier_wait(kOfAttenders, kAttenders); // p is there
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass)
                if (thread() / 32 * 32 / kRowLanes + pass * kRowsAtOnce < rows) // the warp has a row that is there
                    normalize(args, plan, turn, turn_at, sums, pass);
            barrier_wait(kOfAttenders, kAttenders); // p and factor are
            add_values(stage, sums);
            barrier_wait(kOfAttenders, kAttenders); // they were read
        }

        // To shared memory, for all attenders.
        __device__ __forceinline__ void end_chunk(Sums &sums) const {
            const int lane = thread() % kRowLanes;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass)
                if (softmax_row(pass) < rows && lane == 0)
                    sums.of_row[softmax_row(pass)][0] = max_of[pass], sums.of_row[softmax_row(pass)][1] = sum_of[pass];
            const int team = thread() / kQuads, col = thread() % kQuads * 4, groups = row_groups();
            const int row0 = (team & (groups - 1)) * kTeamRows;
            if (thread() == 0) sums.groups = groups;
#pragma unroll
            for (int r = 0; r < kTeamRows; ++r) {
                if (row0 + r >= rows) break;
#pragma unroll
                for (int n = 0; n < 4; n += kVec<Real>) {
                    Vec<Real> vec;
#pragma unroll
                    for (int c = 0; c < kVec<Real>; ++c) vec.x[c] = acc_o[r][n + c];
                    *reinterpret_cast<Vec<Real> *>(&sums.o[team][r][col + n]) = vec;
                }
            }
        }

    private:
        static constexpr Real kLog2E = Real(1.44269504088896340736);

        // q.k of kCount rows from row0 on and this thread's key.
        template <int kCount>
        __device__ __forceinline__ void make_scores(const Stage &stage, const Queries &queries, Sums &sums,
                                                    int row0) const {
            const int key = thread() / kSplit, own = thread() % kSplit;
            // Where kSplit threads read less than all banks, keys that are read together begin elsewhere.
            const int twist = kSplit < 8 ? key % (8 / kSplit) : 0;
            Real acc_s[kCount] = {};
#pragma unroll(kCount > 4 ? 1 : 2)
            for (int step = 0; step < kSteps; ++step) {
                const int col = ((step ^ twist) * kSplit + own) * kVec<Real>;
                const Vec<Real> k = vec_at(&stage.k[key][col]);
#pragma unroll
                for (int r = 0; r < kCount; ++r) {
                    const Vec<Real> q = vec_at(&queries.x[row0 + r][col]);
#pragma unroll
                    for (int c = 0; c < kVec<Real>; ++c) acc_s[r] = fma_of(q.x[c], k.x[c], acc_s[r]);
                }
            }
            scatter_sums<kCount, kSplit>(acc_s, own);
            constexpr int kOwnRows = kCount > kSplit ? kCount / kSplit : 1,
                          kAlike = kSplit > kCount ? kSplit / kCount : 1;
            if (own % kAlike == 0)
#pragma unroll
                for (int r = 0; r < kOwnRows; ++r) sums.p[row0 + own / kAlike * kOwnRows + r][key] = acc_s[r];
        }

        __device__ __forceinline__ QueryRow query_of(const DecodePlan &plan, const Cursor<kKeys> &turn,
                                                     int pass) const {
            return QueryRow(plan, turn.head, turn.row0(kRows) + min(softmax_row(pass), rows - 1));
        }

        // A row's scores, m so far, e^(s - m), l.
        __device__ __forceinline__ void normalize(const fa_kvcache_args &args, const DecodePlan &plan,
                                                  const Cursor<kKeys> &turn, int turn_at, Sums &sums, int pass) {
            const bool is_there = softmax_row(pass) < rows;
            const int row = min(softmax_row(pass), rows - 1), lane = thread() % kRowLanes;
            const ScoreChanges<Real> changes(args, turn);
            Real score[kOfLane], most = max_of[pass], sum = 0;
#pragma unroll
            for (int e = 0; e < kOfLane; ++e) {
                const int key = turn_at * kKeys + lane + e * kRowLanes;
                Real s = product(sums.p[row][lane + e * kRowLanes], unit);
                if (plan.is_modified) s = product(changes.of(s, query_of(plan, turn, pass), key), kLog2E);
                if (key < lo[pass] || key >= hi[pass]) s = -infinity(Real());
                score[e] = s;
                most = max(most, s); // of a NaN and a number the number
            }
            most = row_max_of<kRowLanes>(most);
            const Real shift = shift_of(most), factor = exp2_of(max_of[pass] - shift);
#pragma unroll
            for (int e = 0; e < kOfLane; ++e) {
                const Real p = exp2_of(score[e] - shift);
                sum += p;
                if (is_there) sums.p[row][lane + e * kRowLanes] = p;
            }
            max_of[pass] = most;
            sum_of[pass] = fma_of(sum_of[pass], factor, row_sum_of<kRowLanes>(sum));
            if (is_there && lane == 0) sums.factor[row] = factor;
        }

        __device__ __forceinline__ int row_groups() const {
            int groups = 1;
            while (groups * kTeamRows < rows) groups *= 2;
            return groups;
        }

        // O of this thread's team.
        __device__ __forceinline__ void add_values(const Stage &stage, const Sums &sums) {
            const int team = thread() / kQuads, col = thread() % kQuads * 4, groups = row_groups();
            const int row0 = (team & (groups - 1)) * kTeamRows, keys = kKeys / kTeams * groups;
            if (row0 >= rows) return;
#pragma unroll
            for (int r = 0; r < kTeamRows; ++r) {
                const Real factor = sums.factor[min(row0 + r, rows - 1)];
#pragma unroll
                for (int n = 0; n < 4; ++n) acc_o[r][n] *= factor;
            }
            const int begin = (team & -groups) * (kKeys / kTeams);
#pragma unroll 1
            for (int key0 = begin; key0 < begin + keys; key0 += kVec<Real>) {
                Vec<Real> v[kVec<Real>][4 / kVec<Real>];
#pragma unroll
                for (int j = 0; j < kVec<Real>; ++j)
#pragma unroll
                    for (int n = 0; n < 4; n += kVec<Real>) v[j][n / kVec<Real>] = vec_at(&stage.v[key0 + j][col + n]);
#pragma unroll
                for (int r = 0; r < kTeamRows; ++r) {
                    const Vec<Real> p = vec_at(&sums.p[row0 + r][key0]); // of kVec keys
#pragma unroll
                    for (int j = 0; j < kVec<Real>; ++j)
#pragma unroll
                        for (int n = 0; n < 4; ++n)
                            acc_o[r][n] = fma_of(p.x[j], v[j][n / kVec<Real>].x[n % kVec<Real>], acc_o[r][n]);
                }
            }
        }
    };

    // Columns of O, four at a time.
    static __device__ __forceinline__ int column(int quad, int c) { return 4 * quad + c; }
    // The sum of all teams that have the row.
    static __device__ __forceinline__ Part<Real> part_of(const Sums &sums, int row, int quad) {
        Part<Real> part = {sums.of_row[row][0], sums.of_row[row][1], {}};
        const int groups = sums.groups;
#pragma unroll 2
        for (int team = row / kTeamRows; team < kTeams; team += groups)
#pragma unroll
            for (int n = 0; n < 4; n += kVec<Real>) {
                const Vec<Real> vec = vec_at(&sums.o[team][row % kTeamRows][4 * quad + n]);
#pragma unroll
                for (int c = 0; c < kVec<Real>; ++c) part.o[n + c] += vec.x[c];
            }
        return part;
    }
};

#endif
