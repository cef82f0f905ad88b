// A problem: one case of the table, or a random one, laid out in guarded memory for one kernel and dtype.
#ifndef FA_TEST_PROBLEM_H
#define FA_TEST_PROBLEM_H

#include "flash_attention.h"
#include "guarded.h"
#include "harness.h"

typedef enum layout {
    LAYOUT_BHLD,     // contiguous
    LAYOUT_BLHD,     // the transposed view of a (B, L, H, D) tensor
    LAYOUT_GAPS,     // unused elements after each row and each head
    LAYOUT_EXPANDED, // k and v are one batch entry, seen B times
    LAYOUT_COUNT
} layout;
typedef enum lengths { LENGTHS_FULL, LENGTHS_PADDED, LENGTHS_PACKED, LENGTHS_COUNT } lengths;

typedef struct attention_case {
    const char *name;
    int batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v; // heads_kv, head_dim_v 0: as of q
    bool causal;
    bool window;
    int window_left, window_right;
    double softcap, dropout_p;
    const char *bias; // the axes it has, of "bhqk"; NULL: none, "" broadcasts over all. '-': some are -inf; '~': -1e9
    int alibi;        // 1: one slope a head, 2: one for each (b, h)
    bool sinks, d_lse;
    bool wide_extras;  // bias, slopes and sinks in float32 whatever the dtype
    bool const_extras; // no gradient of bias and slopes is wanted
    lengths lengths;
    layout layout;
    double magnitude; // of q; 0: 1
    bool narrow;      // for the 16-bit dtypes alone
} attention_case;

// clang-format off
typedef enum view_id {
    VIEW_Q, VIEW_K, VIEW_V, VIEW_BIAS, VIEW_SLOPES, VIEW_SINKS, VIEW_D_O, VIEW_D_LSE, // inputs
    VIEW_O, VIEW_LSE, VIEW_D_Q, VIEW_D_K, VIEW_D_V, VIEW_D_BIAS, VIEW_D_SLOPES, VIEW_D_SINKS, // outputs
    VIEW_COUNT,
    VIEW_FIRST_OUTPUT = VIEW_O
} view_id;
// clang-format on

typedef struct view { // absent: data NULL
    void *data;
    fa_dtype dtype;
    int64_t sizes[4], strides[4];
    int64_t elements; // of the memory: fewer than the product of sizes if it broadcasts, more if there are gaps
} view;

typedef struct problem {
    fa_backward_args args;
    int32_t *lengths_q, *lengths_k; // seqlens or cu_seqlens for the test to change; protected
    view views[VIEW_COUNT];
} problem;

extern const char *const kViewNames[VIEW_COUNT];

// The same numbers whatever the layout and placement. oracle: in float64, the numbers rounded to dtype.
problem problem_make(const attention_case *c, fa_dtype dtype, fa_impl impl, bool oracle, placement where);
// naive, fused and the reference serve everything: a refusal of theirs is not asked for but found by problem_run(). Others
// may refuse a problem for where it lies.
bool problem_serves(const problem *p, fa_pass pass);
// Forward, then backward if served, with exactly the workspace asked for; expects success and untouched gaps.
void problem_run(problem *p, fa_workers workers, placement where);
double view_at(const view *v, int64_t logical_index);
int64_t view_size(const view *v); // logical elements

#endif
