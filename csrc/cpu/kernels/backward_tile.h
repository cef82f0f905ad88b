// One tile of the backward: P and dS of kGradM query rows against kGradN keys, recomputed from q, k and lse.
//
//   P = norm e^(s - lse);  dP = dropout(d_o v^T);  dS = P (dP - delta);  through softcap: dS (1 - tanh^2)
#ifndef FA_BACKWARD_TILE_H
#define FA_BACKWARD_TILE_H

#include "cpu/kernels/backward_plan.h"

// Rows [m0, m0 + rows) of head h against keys [n0, n0 + kGradN).
typedef struct grad_tile {
    const backward_plan *plan;
    const score_rule *rule;
    int64_t b, h, h_kv, m0, rows, n0;
    int64_t strip_lo[kGradStrips], strip_hi[kGradStrips]; // visible columns of each strip, relative to n0; 0, 0 if none
} grad_tile;

static int64_t panel_floor(int64_t column) { return column / kMicroCols * kMicroCols; }

// s -> P where dropout keeps it, dP -> dS, in place, over columns [lo, hi) of one row. Returns sum_j dS |i + offset - j| for ALiBi.
static double grad_row(const grad_tile *tile, const backward_scratch *scratch, int64_t r, int64_t lo, int64_t hi,
                       real lse, real norm, real delta, int through_softcap) {
    const score_rule *rule = tile->rule;
    const fa_forward_args *forward = rule->args;
    const int64_t row = tile->m0 + r, col0 = tile->n0 + lo, n = hi - lo;
    real *p = scratch->p + r * kScoreStride + lo, *ds = scratch->ds + r * kScoreStride + lo;
    finish_scores(rule, p, row, col0, n, scratch->capped, scratch->row);
    const vreal v_lse = v_set1(lse), v_delta = v_set1(delta), v_norm = v_set1(norm), log2e = v_set1(kLog2E);
    const vreal kept = v_set1(kept_scale(forward));
    const real *keep = forward->dropout_p > 0 ? scratch->keep + r * kScoreStride + lo : NULL;
    for (int64_t c = 0; c < n; c += kLanes) {
        const vreal prob = v_mul(v_norm, v_exp2(v_mul(v_sub(v_load(p + c), v_lse), log2e)));
        const vreal d_prob = keep ? v_mul(v_mul(v_load(ds + c), v_load(keep + c)), kept) : v_load(ds + c);
        v_store(p + c, keep ? v_mul(prob, v_load(keep + c)) : prob);
        v_store(ds + c, v_mul(prob, v_sub(d_prob, v_delta)));
    }
    double slope_sum = 0;
    if (forward->alibi_slopes.data) {
        const int64_t center = row + rule->seq.len_k - rule->seq.len_q - col0;
        for (int64_t c = 0; c < n; ++c) slope_sum += (double)ds[c] * (double)(center > c ? center - c : c - center);
    }
    if (rule->softcap > 0 && through_softcap)
        for (int64_t c = 0; c < n; ++c) ds[c] *= 1 - scratch->capped[c] * scratch->capped[c];
    return slope_sum;
}

// P and dS of a strip as operands: down the rows for d_v and d_k, along the keys for d_q. An odd last row pairs with zeros.
static void pack_strip(const backward_scratch *scratch, int64_t r0, int64_t n, int64_t lo, int64_t hi) {
#if FA_BF16_OPERANDS
    for (int64_t r = r0; r < r0 + n; r += 2) {
        const int64_t at = r * kScoreStride, next = r + 1 < r0 + n;
        for (int64_t c = lo; c < hi; c += kLanes) {
            v_store_down(scratch->p_down + at / 2 + c, v_load(scratch->p + at + c),
                         next ? v_load(scratch->p + at + kScoreStride + c) : v_set1(0));
            v_store_down(scratch->ds_down + at / 2 + c, v_load(scratch->ds + at + c),
                         next ? v_load(scratch->ds + at + kScoreStride + c) : v_set1(0));
        }
    }
    for (int64_t r = r0; r < r0 + n; ++r)
        for (int64_t c = lo; c < hi; c += 2 * kLanes) {
            const real *ds = scratch->ds + r * kScoreStride + c;
            v_store_along(scratch->ds_along + (r * kScoreStride + c) / 2, v_load(ds), v_load(ds + kLanes));
        }
#else
    (void)scratch, (void)r0, (void)n, (void)lo, (void)hi; // they are operands already
#endif
}

// s = q k^T of rows [r0, r0 + n) with the panel of keys at column c, into scratch->p.
static inline void grad_tile_s_panel(const grad_tile *tile, const backward_scratch *scratch, int64_t r0, int64_t n,
                                     int64_t c) {
    const backward_plan *plan = tile->plan;
    const fa_forward_args *forward = tile->rule->args;
    const int64_t q_row = packed_first_row(forward, kSideQ, tile->b) + tile->m0 + r0;
    const int64_t k_row = packed_first_row(forward, kSideK, tile->b) + tile->n0 + c;
    micro_kernel(n, depth_units(forward->head_dim), operands_at(&plan->q, tile->h, q_row), plan->q.row_stride, 1,
                 operands_at(&plan->k_panels, tile->h_kv, k_row), kMicroCols, scratch->p + r0 * kScoreStride + c,
                 kScoreStride, 0);
}

// Adds e^(s - lse) of the tile's rows to sums[kGradM]: what norm is made of.
static void grad_tile_row_sums(const grad_tile *tile, const backward_scratch *scratch, real *sums) {
    const score_rule *rule = tile->rule;
    const fa_forward_args *forward = rule->args;
    const real *lse = packed_at(&tile->plan->lse, tile->h, packed_first_row(forward, kSideQ, tile->b) + tile->m0);
    for (int64_t r0 = 0; r0 < tile->rows; r0 += kMicroRows) {
        const int64_t n = fa_min(kMicroRows, tile->rows - r0);
        for (int64_t c = 0; c < fa_min(kGradN, rule->seq.len_k - tile->n0); c += kMicroCols) {
            grad_tile_s_panel(tile, scratch, r0, n, c);
            for (int64_t r = r0; r < r0 + n; ++r) {
                real *s = scratch->p + r * kScoreStride + c;
                finish_scores(rule, s, tile->m0 + r, tile->n0 + c, kMicroCols, scratch->capped, scratch->row);
                for (int64_t j = 0; j < kMicroCols; j += kLanes)
                    sums[r] += v_hsum(v_exp2(v_mul(v_sub(v_load(s + j), v_set1(lse[r])), v_set1(kLog2E))));
            }
        }
    }
}

// Fills scratch->p and scratch->ds over the panels that each strip sees, and tile->strip_lo, strip_hi.
// through_softcap 0: dS with respect to the capped score, which is what the bias sees.
static double grad_tile_scores(grad_tile *tile, const backward_scratch *scratch, int through_softcap) {
    const backward_plan *plan = tile->plan;
    const fa_forward_args *forward = tile->rule->args;
    const fa_sequence *seq = &tile->rule->seq;
    const int64_t q_row = packed_first_row(forward, kSideQ, tile->b) + tile->m0;
    const int64_t k_row = packed_first_row(forward, kSideK, tile->b) + tile->n0;
    double slope_sum = 0;
    if (forward->dropout_p > 0)
        dropout_tile(scratch->keep, kScoreStride, forward, tile->b * forward->heads_q + tile->h, tile->m0, tile->rows,
                     tile->n0, kGradN, 1);
    for (int64_t r0 = 0, strip = 0; r0 < tile->rows; r0 += kMicroRows, ++strip) {
        const int64_t n = fa_min(kMicroRows, tile->rows - r0);
        const int64_t lo = fa_max(fa_visible_keys(forward, seq, tile->m0 + r0).lo - tile->n0, 0);
        const int64_t hi = fa_min(fa_visible_keys(forward, seq, tile->m0 + r0 + n - 1).hi - tile->n0, kGradN);
        tile->strip_lo[strip] = lo < hi ? lo : 0;
        tile->strip_hi[strip] = lo < hi ? hi : 0;
        if (lo >= hi) continue;
        const int64_t first = panel_floor(lo), last = fa_round_up(hi, kMicroCols);
        for (int64_t c = first; c < last; c += kMicroCols) {
            grad_tile_s_panel(tile, scratch, r0, n, c);
            micro_kernel(n, depth_units(forward->head_dim_v), operands_at(&plan->d_o, tile->h, q_row + r0),
                         plan->d_o.row_stride, 1, operands_at(&plan->v_panels, tile->h_kv, k_row + c), kMicroCols,
                         scratch->ds + r0 * kScoreStride + c, kScoreStride, 0);
        }
        const real *lse = packed_at(&plan->lse, tile->h, q_row), *delta = packed_at(&plan->delta, tile->h, q_row);
        const real *norm = packed_at(&plan->norm, tile->h, q_row);
        for (int64_t r = r0; r < r0 + n; ++r)
            slope_sum += grad_row(tile, scratch, r, first, last, lse[r], norm[r], delta[r], through_softcap);
        pack_strip(scratch, r0, n, first, last);
    }
    return slope_sum;
}

// d_q += dS k, strip by strip over the columns it sees.
static void grad_tile_d_q(const grad_tile *tile, const backward_scratch *scratch, real *d_q) {
    const backward_plan *plan = tile->plan;
    const int64_t k_row = packed_first_row(tile->rule->args, kSideK, tile->b) + tile->n0;
    for (int64_t r0 = 0, strip = 0; r0 < tile->rows; r0 += kMicroRows, ++strip) {
        const int64_t lo = tile->strip_lo[strip] / kDepth * kDepth, hi = tile->strip_hi[strip];
        if (lo >= hi) continue;
        for (int64_t d = 0; d < plan->d_stride; d += kMicroCols)
            micro_kernel(fa_min(kMicroRows, tile->rows - r0), depth_units(hi - lo),
                         scratch->ds_along + (r0 * kScoreStride + lo) / kDepth, kScoreStride / kDepth, 1,
                         operands_at(&plan->k, tile->h_kv, k_row + lo) + d, plan->d_stride,
                         d_q + r0 * plan->d_stride + d, plan->d_stride, 1);
    }
}

// d_v += P^T d_o and d_k += dS^T q, panel by panel of keys over the rows whose strips computed that panel. The interval's
// ends grow with the row, so those strips are neighbours.
static void grad_tile_d_kv(const grad_tile *tile, const backward_scratch *scratch) {
    const backward_plan *plan = tile->plan;
    const int64_t q_row = packed_first_row(tile->rule->args, kSideQ, tile->b) + tile->m0;
    const int64_t strips = fa_ceil_div(tile->rows, kMicroRows);
    for (int64_t panel = 0; panel < kGradN; panel += kMicroCols) {
        int64_t first = 0, last = strips;
        while (first < strips && !(panel_floor(tile->strip_lo[first]) <= panel && panel < tile->strip_hi[first]))
            ++first;
        while (last > first && !(panel_floor(tile->strip_lo[last - 1]) <= panel && panel < tile->strip_hi[last - 1]))
            --last;
        if (first >= last) continue;
        const int64_t row = first * kMicroRows, units = depth_units(fa_min(last * kMicroRows, tile->rows) - row);
        const operand *d_o = operands_at(&plan->d_o_down, tile->h, q_row + row);
        const operand *q = operands_at(&plan->q_down, tile->h, q_row + row);
        for (int64_t key = panel; key < panel + kMicroCols; key += kMicroRows) {
            const int64_t keys = fa_min(kMicroRows, panel + kMicroCols - key), at = row / kDepth * kScoreStride + key;
            for (int64_t d = 0; d < plan->dv_stride; d += kMicroCols)
                micro_kernel(keys, units, scratch->p_down + at, 1, kScoreStride, d_o + d, plan->dv_stride,
                             scratch->d_v + key * plan->dv_stride + d, plan->dv_stride, 1);
            for (int64_t d = 0; d < plan->d_stride; d += kMicroCols)
                micro_kernel(keys, units, scratch->ds_down + at, 1, kScoreStride, q + d, plan->d_stride,
                             scratch->d_k + key * plan->d_stride + d, plan->d_stride, 1);
        }
    }
}

#endif
