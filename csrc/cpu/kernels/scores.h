// From q.k to the score s, one row at a time: softcap, bias, ALiBi, and -inf where the row does not see the key.
#ifndef FA_SCORES_H
#define FA_SCORES_H

#include "cpu/kernels/packing.h"

// What modifies the scores of one head of one sequence.
typedef struct score_rule {
    const fa_forward_args *args;
    fa_sequence seq;
    const char *bias; // element (0, 0) of the head's bias, or NULL
    real softcap;     // 0: none
    real slope;       // ALiBi; 0: none
    int modified;     // any of the three
} score_rule;

static score_rule score_rule_of(const fa_forward_args *args, int64_t b, int64_t h) {
    score_rule rule = {args, fa_sequence_at(args, b), NULL, (real)args->softcap, 0, 0};
    if (args->bias.data)
        rule.bias = element_at(args->bias.data, args->bias.dtype, b * args->bias.stride_b + h * args->bias.stride_h);
    const fa_per_head *slopes = &args->alibi_slopes;
    if (slopes->data)
        rule.slope = (real)fa_load(slopes->data, slopes->dtype, b * slopes->stride_b + h * slopes->stride_h);
    rule.modified = rule.bias || rule.softcap > 0 || rule.slope != 0;
    return rule;
}

// tanh(x), relative error a few roundings: x times an odd polynomial's quotient where 1 - 2 / (1 + e^2x) would cancel.
static inline vreal v_tanh(vreal x) {
    const vreal bounded = v_sub(v_set1(0), v_max(v_set1(-20), v_sub(v_set1(0), x))); // min(x, 20): NaN passes
    const vreal e_2x = v_exp2(v_mul(bounded, v_set1(2 * kLog2E)));
    const vreal far = v_sub(v_set1(1), v_div(v_set1(2), v_add(e_2x, v_set1(1))));
    const vreal x2 = v_mul(x, x); // continued fraction: x / (1 + x2 / (3 + x2 / (5 + x2 / (7 + ...))))
    vreal fraction = v_set1(kTanhTerms);
    for (int odd = kTanhTerms - 2; odd > 0; odd -= 2) fraction = v_add(v_set1((real)odd), v_div(x2, fraction));
    return v_select_below(x2, v_set1((real)0.36), v_div(x, fraction), far);
}

// s[0 ... n): q.k of row `row` with keys col0 + [0, n), scaled -> scores. n is a multiple of kMicroCols; keys past the
// tensor are left for mask_scores. capped: where not NULL, receives tanh(s / softcap). scratch: n elements.
static void modify_scores(const score_rule *rule, real *s, int64_t row, int64_t col0, int64_t n, real *capped,
                          real *scratch) {
    if (rule->softcap > 0) {
        const vreal cap = v_set1(rule->softcap), inverse = v_set1(1 / rule->softcap);
        for (int64_t c = 0; c < n; c += kLanes) {
            const vreal t = v_tanh(v_mul(v_load(s + c), inverse));
            v_store(s + c, v_mul(cap, t));
            if (capped) v_store(capped + c, t);
        }
    }
    if (rule->bias) {
        const fa_bias *bias = &rule->args->bias;
        const int64_t inside = fa_min(n, rule->args->seqlen_k - col0);
        load_strided(scratch, element_at(rule->bias, bias->dtype, row * bias->stride_q + col0 * bias->stride_k), inside,
                     bias->stride_k, bias->dtype);
        for (int64_t c = 0; c < inside; ++c) s[c] += scratch[c];
    }
    if (rule->slope != 0) {
        const int32_t distance = (int32_t)(row + rule->seq.len_k - rule->seq.len_q - col0);
        for (int32_t c = 0; c < n; ++c) s[c] -= rule->slope * (real)(distance > c ? distance - c : c - distance);
    }
}

// -inf in s[0 ... n), which stands for keys col0 + [0, n), outside the row's interval.
static inline void mask_scores(real *s, int64_t col0, int64_t n, fa_interval keys) {
    const int64_t lo = fa_min(fa_max(keys.lo - col0, 0), n), hi = fa_max(fa_min(keys.hi - col0, n), 0);
    for (int64_t c = 0; c < lo; ++c) s[c] = -INFINITY;
    for (int64_t c = hi; c < n; ++c) s[c] = -INFINITY;
}

// s[0 ... n): products q.k, where packing did not scale q -> scores, -inf where the row does not see the key.
static inline void finish_scores(const score_rule *rule, real *s, int64_t row, int64_t col0, int64_t n, real *capped,
                                 real *scratch) {
    const vreal scale = v_set1(product_scale((real)rule->args->softmax_scale));
    for (int64_t c = 0; kDepth > 1 && c < n; c += kLanes) v_store(s + c, v_mul(v_load(s + c), scale));
    if (rule->modified) modify_scores(rule, s, row, col0, n, capped, scratch);
    mask_scores(s, col0, n, fa_visible_keys(rule->args, &rule->seq, row));
}

#endif
