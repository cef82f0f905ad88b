// A problem of attention over a cache: one case of the table laid out in guarded memory for one kernel and dtype.
#ifndef FA_TEST_KVCACHE_PROBLEM_H
#define FA_TEST_KVCACHE_PROBLEM_H

#include "flash_attention.h"
#include "guarded.h"
#include "harness.h"

enum { kMostSequences = 5 };

typedef struct kvcache_case {
    const char *name;
    int batch, heads_q, heads_kv, seqlen_q, capacity, head_dim, head_dim_v; // heads_kv, head_dim_v 0: as of q
    int lengths[kMostSequences];                                            // of the cached tokens
    bool append;                                                            // k and v are given
    int page_size;                                                          // 0: contiguous
    bool indexed;                  // contiguous, through a page_table of one column
    bool shared;                   // paged: all sequences begin with the same page
    bool token_major;              // the caches are views of (B, L, H, D)
    int rotary_dim;                // 0: none
    bool interleaved, wide_rotary; // wide: float32 whatever the dtype
    bool causal, window;
    int window_left, window_right;
    double softcap;
    int alibi; // 1: one slope a head, 2: one for each (b, h)
    bool sinks;
    int tree;    // 1: one mask, 2: one for each sequence
    bool float8; // the cache; only with 16-bit dtypes
    int descale; // 1: one a head, 2: one for each (b, h)
    bool no_lse;
    double magnitude; // of q; 0: 1
} kvcache_case;

typedef struct kvcache_tensor { // absent: data NULL
    void *data;
    fa_dtype dtype;
    int64_t sizes[4], strides[4];
} kvcache_tensor;

typedef struct kvcache_problem {
    fa_kvcache_args args;
    int32_t *lengths, *pages;
    kvcache_tensor q, k, v, k_cache, v_cache, o, lse;
} kvcache_problem;

// The same numbers whatever the placement. Rows of the caches that hold no token are NaN, and so is what is not written.
kvcache_problem kvcache_problem_make(const kvcache_case *c, fa_dtype dtype, fa_impl impl, placement where);
bool kvcache_problem_serves(const kvcache_problem *p);
// Runs with exactly the workspace asked for; expects success.
void kvcache_problem_run(kvcache_problem *p, fa_workers workers, placement where);
// Leaves sequence b alone, to be run.
void kvcache_problem_keep(kvcache_problem *p, int b);

int64_t kvcache_size(const kvcache_tensor *t); // logical elements
double kvcache_at(const kvcache_tensor *t, int64_t logical_index);
int64_t kvcache_row(const kvcache_problem *p, const kvcache_tensor *cache, int b, int head,
                    int64_t token); // its offset

#endif
