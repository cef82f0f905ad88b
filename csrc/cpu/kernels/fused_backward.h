// Backward by recomputation: no score matrix, no atomics, one order of every sum whatever the thread count.
// Source: Dao, "FlashAttention-2" (2023), algorithm 2.
//
//   pack: per (b, h) q, d_o, lse, delta = rowsum(d_o * o) - d_lse; per (b, h_kv) k, k^T, v^T
//   norm: per tile of rows, only where scores are large
//   keys: per (b, h_kv, key lane): for each key block of the lane, for each query head of the group, for each tile of rows:
//           P, dS (backward_tile.h);  d_v += P^T d_o;  d_k += dS^T q;  d_q[lane] += dS k
//   rows: d_q = softmax_scale * sum over lanes;  d_sink -= P of the sink * delta
//   bias: per element block of d_bias, summed over what it is broadcast to (recomputes dS, so nothing is stored)
#ifndef FA_FUSED_BACKWARD_H
#define FA_FUSED_BACKWARD_H

#include "cpu/kernels/backward_tile.h"

// ---- pack -----------------------------------------------------------------------------------------------------------

static void backward_pack_k_task(void *arg, int64_t task, int32_t worker) {
    const backward_plan *plan = arg;
    const fa_forward_args *forward = &plan->args->forward;
    const fa_place place = fa_place_of(task, forward->heads_kv, plan->k_chunks);
    const int64_t row0 = place.part * kPackRows, head = place.head, b = place.b;
    const fa_sequence seq = fa_sequence_at(forward, b);
    const int64_t n = fa_min(kPackRows, seq.len_k - row0);
    operand *scratch = (operand *)backward_scratch_at(plan, worker, NULL).pack;
    const pack_source k = {forward, &forward->k, kSideK, b, head, row0, n, forward->head_dim, seq, NULL};
    const pack_source v = {forward, &forward->v, kSideK, b, head, row0, n, forward->head_dim_v, seq, NULL};
    pack_panels(pack_target(&plan->k_panels, &k), &k, scratch);
    pack_panels(pack_target(&plan->v_panels, &v), &v, scratch);
    pack_down(pack_target(&plan->k, &k), plan->k.row_stride, &k);
}

// rowsum(d_o * o) of one row. scratch: two rows of dv_stride.
static real row_delta(const pack_source *d_o, const pack_source *o, int64_t row, int64_t dv_stride, real *scratch) {
    const fa_dtype dtype = d_o->args->dtype;
    load_row(scratch, source_row(d_o, row), d_o->width, dv_stride, dtype, 1);
    load_row(scratch + dv_stride, source_row(o, row), o->width, dv_stride, dtype, 1);
    vreal sum = v_set1(0);
    for (int64_t d = 0; d < dv_stride; d += kLanes)
        sum = v_fma(v_load(scratch + d), v_load(scratch + dv_stride + d), sum);
    return v_hsum(sum);
}

static void backward_pack_q_task(void *arg, int64_t task, int32_t worker) {
    const backward_plan *plan = arg;
    const fa_backward_args *args = plan->args;
    const fa_forward_args *forward = &args->forward;
    const fa_place place = fa_place_of(task, forward->heads_q, plan->q_chunks);
    const int64_t row0 = place.part * kPackRows, h = place.head, b = place.b;
    const fa_sequence seq = fa_sequence_at(forward, b);
    const int64_t n = fa_min(kPackRows, seq.len_q - row0), first = packed_first_row(forward, kSideQ, b);
    real *scratch = backward_scratch_at(plan, worker, NULL).pack;
    const pack_source q = {forward, &forward->q, kSideQ, b, h, row0, n, forward->head_dim, seq, NULL};
    const pack_source d_o = {forward, &args->d_o, kSideQ, b, h, row0, n, forward->head_dim_v, seq, &forward->lse};
    const pack_source o = {forward, &forward->o, kSideQ, b, h, row0, n, forward->head_dim_v, seq, NULL};
    pack_along(pack_target(&plan->q, &q), plan->q.row_stride, &q, pack_scale((real)forward->softmax_scale));
    pack_along(pack_target(&plan->d_o, &d_o), plan->d_o.row_stride, &d_o, 1);
    if (kDepth > 1) {
        pack_down(pack_target(&plan->q_down, &q), plan->q_down.row_stride, &q);
        pack_down(pack_target(&plan->d_o_down, &d_o), plan->d_o_down.row_stride, &d_o);
    }
    for (int64_t row = row0; row < row0 + n; ++row) {
        const int64_t lse_at = fa_row_offset(&forward->lse, seq.batch_index, h, seq.row_q + row);
        const int64_t d_lse_at = fa_row_offset(&args->d_lse, seq.batch_index, h, seq.row_q + row);
        const real lse = ((const real *)forward->lse.data)[lse_at];
        real delta = row_delta(&d_o, &o, row, plan->dv_stride, scratch);
        if (args->d_lse.data) delta -= ((const real *)args->d_lse.data)[d_lse_at];
        if (lse == -INFINITY) delta = 0;
        *packed_at(&plan->lse, h, first + row) = lse == -INFINITY ? INFINITY : lse; // no visible key: P = e^-inf = 0
        *packed_at(&plan->delta, h, first + row) = delta;
        *packed_at(&plan->norm, h, first + row) = 1;
    }
}

// Large scores only: lse is rounded to |lse| 2^-24, and e^(s - lse) is off by as much; where that exceeds what rounding does
// to P anyway, the rows of a tile are summed once more and P is divided by the sum. The sink is a term of it.
static void backward_norm_task(void *arg, int64_t task, int32_t worker) {
    const backward_plan *plan = arg;
    const fa_forward_args *forward = &plan->args->forward;
    const fa_place place = fa_place_of(task, forward->heads_q, plan->q_tiles);
    const int64_t m0 = place.part * kGradM, h = place.head, b = place.b;
    const score_rule rule = score_rule_of(forward, b, h);
    const int64_t rows = fa_min(kGradM, rule.seq.len_q - m0);
    const real *lse = packed_at(&plan->lse, h, packed_first_row(forward, kSideQ, b) + m0);
    int large = 0;
    for (int64_t r = 0; r < rows; ++r) large |= fabs((double)lse[r]) > kLargeLse && lse[r] != INFINITY;
    if (!large) return;
    const backward_scratch scratch = backward_scratch_at(plan, worker, NULL);
    real sums[kGradM];
    for (int64_t r = 0; r < rows; ++r) sums[r] = real_exp(sink_of(forward, h) - lse[r]);
    const int64_t lo = fa_visible_keys(forward, &rule.seq, m0).lo,
                  hi = fa_visible_keys(forward, &rule.seq, m0 + rows - 1).hi;
    for (int64_t n0 = lo / kGradN * kGradN; n0 < hi; n0 += kGradN) {
        const grad_tile tile = {plan, &rule, b, h, h / (forward->heads_q / forward->heads_kv), m0, rows, n0, {0}, {0}};
        grad_tile_row_sums(&tile, &scratch, sums);
    }
    real *norm = packed_at(&plan->norm, h, packed_first_row(forward, kSideQ, b) + m0);
    for (int64_t r = 0; r < rows; ++r) norm[r] = lse[r] == INFINITY ? 1 : 1 / sums[r];
}

// ---- keys -----------------------------------------------------------------------------------------------------------

static void store_keys(const backward_plan *plan, const backward_scratch *scratch, const fa_sequence *seq, int64_t h_kv,
                       int64_t n0) {
    const fa_backward_args *args = plan->args;
    const fa_dtype dtype = args->forward.dtype;
    for (int64_t key = 0; key < fa_min(kGradN, seq->len_k - n0); ++key) {
        const int64_t row = seq->row_k + n0 + key;
        store_tensor_row(&args->d_k, dtype, seq->batch_index, h_kv, row, scratch->d_k + key * plan->d_stride,
                         args->forward.head_dim, product_scale((real)args->forward.softmax_scale));
        store_tensor_row(&args->d_v, dtype, seq->batch_index, h_kv, row, scratch->d_v + key * plan->dv_stride,
                         args->forward.head_dim_v, kept_scale(&args->forward));
    }
}

static void backward_keys_task(void *arg, int64_t task, int32_t worker) {
    const backward_plan *plan = arg;
    const fa_forward_args *forward = &plan->args->forward;
    const fa_place place = fa_place_of(task, forward->heads_kv, plan->key_lanes);
    const int64_t lane = place.part, h_kv = place.head, b = place.b, group = forward->heads_q / forward->heads_kv;
    const backward_scratch scratch = backward_scratch_at(plan, worker, NULL);
    const fa_sequence seq = fa_sequence_at(forward, b);
    const int64_t q_row = packed_first_row(forward, kSideQ, b);
    for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        memset(packed_at(&plan->d_q, lane * forward->heads_q + h, q_row), 0,
               (size_t)(seq.len_q * plan->d_stride) * sizeof(real));
        plan->d_slopes[(b * forward->heads_q + h) * plan->key_lanes + lane] = 0;
    }
    for (int64_t n0 = lane * kGradN; n0 < seq.len_k; n0 += plan->key_lanes * kGradN) {
        memset(scratch.d_k, 0, (size_t)(kGradN * plan->d_stride) * sizeof(real));
        memset(scratch.d_v, 0, (size_t)(kGradN * plan->dv_stride) * sizeof(real));
        for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
            const score_rule rule = score_rule_of(forward, b, h);
            for (int64_t m0 = 0; m0 < seq.len_q; m0 += kGradM) {
                grad_tile tile = {plan, &rule, b, h, h_kv, m0, fa_min(kGradM, seq.len_q - m0), n0, {0}, {0}};
                if (fa_visible_keys(forward, &seq, m0 + tile.rows - 1).hi <= n0) continue;
                if (fa_visible_keys(forward, &seq, m0).lo >= n0 + kGradN) break;
                plan->d_slopes[(b * forward->heads_q + h) * plan->key_lanes + lane] -=
                    grad_tile_scores(&tile, &scratch, 1);
                grad_tile_d_q(&tile, &scratch, packed_at(&plan->d_q, lane * forward->heads_q + h, q_row + m0));
                grad_tile_d_kv(&tile, &scratch);
            }
        }
        store_keys(plan, &scratch, &seq, h_kv, n0);
    }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

static void backward_rows_task(void *arg, int64_t task, int32_t worker) {
    const backward_plan *plan = arg;
    const fa_backward_args *args = plan->args;
    const fa_forward_args *forward = &args->forward;
    const fa_place place = fa_place_of(task, forward->heads_q, plan->q_chunks);
    const int64_t row0 = place.part * kPackRows, h = place.head, b = place.b;
    const fa_sequence seq = fa_sequence_at(forward, b);
    const int64_t first = packed_first_row(forward, kSideQ, b);
    const double sink = (double)sink_of(forward, h);
    double d_sink = 0;
    (void)worker;
    for (int64_t row = row0; row < fa_min(row0 + kPackRows, seq.len_q); ++row) {
        real *sum = packed_at(&plan->d_q, h, first + row);
        for (int64_t lane = 1; lane < plan->key_lanes; ++lane) {
            const real *part = packed_at(&plan->d_q, lane * forward->heads_q + h, first + row);
            for (int64_t d = 0; d < plan->d_stride; d += kLanes)
                v_store(sum + d, v_add(v_load(sum + d), v_load(part + d)));
        }
        store_tensor_row(&args->d_q, forward->dtype, seq.batch_index, h, seq.row_q + row, sum, forward->head_dim,
                         (real)forward->softmax_scale);
        if (sink != -INFINITY)
            d_sink -= exp(sink - (double)*packed_at(&plan->lse, h, first + row)) *
                      (double)*packed_at(&plan->norm, h, first + row) *
                      (double)*packed_at(&plan->delta, h, first + row);
    }
    plan->d_sinks[task] = d_sink; // task counts (b, h, chunk)
}

// ---- bias -----------------------------------------------------------------------------------------------------------

// Extents of d_bias in blocks: an axis it is broadcast over is one block that loops over the whole axis.
typedef struct bias_blocks {
    const backward_plan *plan;
    int64_t batches, heads, row_blocks, col_blocks;
} bias_blocks;

static bias_blocks bias_blocks_of(const backward_plan *plan) {
    const fa_forward_args *forward = &plan->args->forward;
    const fa_bias *d_bias = &plan->args->d_bias;
    const int64_t row_blocks = fa_ceil_div(forward->seqlen_q, kGradM),
                  col_blocks = fa_ceil_div(forward->seqlen_k, kGradN);
    return (bias_blocks){plan, d_bias->stride_b ? forward->batch : 1, d_bias->stride_h ? forward->heads_q : 1,
                         d_bias->stride_q ? row_blocks : 1, d_bias->stride_k ? col_blocks : 1};
}

// sum += dS of one head over rows [m0, …) and keys [n0, …), where an axis of extent 1 sums over the tile.
static void add_bias_tile(const backward_plan *plan, const backward_scratch *scratch, int64_t b, int64_t h, int64_t m0,
                          int64_t n0, double *sum) {
    const fa_forward_args *forward = &plan->args->forward;
    const fa_bias *d_bias = &plan->args->d_bias;
    const score_rule rule = score_rule_of(forward, b, h);
    const int64_t rows = fa_min(kGradM, rule.seq.len_q - m0);
    if (rows <= 0 || n0 >= rule.seq.len_k) return;
    grad_tile tile = {plan, &rule, b, h, h / (forward->heads_q / forward->heads_kv), m0, rows, n0, {0}, {0}};
    grad_tile_scores(&tile, scratch, 0);
    for (int64_t r = 0; r < rows; ++r) {
        double *into = sum + (d_bias->stride_q ? r * kGradN : 0);
        const real *ds = scratch->ds + r * kScoreStride;
        for (int64_t c = tile.strip_lo[r / kMicroRows]; c < tile.strip_hi[r / kMicroRows]; ++c)
            into[d_bias->stride_k ? c : 0] += (double)ds[c];
    }
}

static void backward_bias_task(void *arg, int64_t task, int32_t worker) {
    const bias_blocks *blocks = arg;
    const backward_plan *plan = blocks->plan;
    const fa_forward_args *forward = &plan->args->forward;
    const fa_bias *d_bias = &plan->args->d_bias;
    const backward_scratch scratch = backward_scratch_at(plan, worker, NULL);
    const int64_t col_block = task % blocks->col_blocks, row_block = task / blocks->col_blocks % blocks->row_blocks;
    const int64_t head = task / blocks->col_blocks / blocks->row_blocks % blocks->heads;
    const int64_t batch = task / blocks->col_blocks / blocks->row_blocks / blocks->heads;
    const int64_t m0 = row_block * kGradM, n0 = col_block * kGradN;
    double *sum = scratch.d_bias;
    memset(sum, 0, kGradM * kGradN * sizeof(double));
    for (int64_t b = d_bias->stride_b ? batch : 0; b < (d_bias->stride_b ? batch + 1 : forward->batch); ++b)
        for (int64_t h = d_bias->stride_h ? head : 0; h < (d_bias->stride_h ? head + 1 : forward->heads_q); ++h)
            for (int64_t m = m0; m < (d_bias->stride_q ? m0 + 1 : forward->seqlen_q); m += kGradM)
                for (int64_t n = n0; n < (d_bias->stride_k ? n0 + 1 : forward->seqlen_k); n += kGradN)
                    add_bias_tile(plan, &scratch, b, h, m, n, sum);
    const int64_t rows = d_bias->stride_q ? fa_min(kGradM, forward->seqlen_q - m0) : 1;
    const int64_t cols = d_bias->stride_k ? fa_min(kGradN, forward->seqlen_k - n0) : 1;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
            fa_store(d_bias->data, d_bias->dtype,
                     batch * d_bias->stride_b + head * d_bias->stride_h + (m0 + r) * d_bias->stride_q +
                         (n0 + c) * d_bias->stride_k,
                     sum[r * kGradN + c]);
}

// ---- the call -------------------------------------------------------------------------------------------------------

static size_t fused_backward_workspace_bytes(const fa_backward_args *args) {
    return backward_plan_of(args).workspace_bytes;
}

static void fused_backward_run(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    backward_plan plan = backward_plan_of(args);
    const int64_t q_heads = forward->batch * forward->heads_q, kv_heads = forward->batch * forward->heads_kv;
    fa_parallel_for(&forward->workers, q_heads * plan.q_chunks, backward_pack_q_task, &plan);
    fa_parallel_for(&forward->workers, kv_heads * plan.k_chunks, backward_pack_k_task, &plan);
    fa_parallel_for(&forward->workers, q_heads * plan.q_tiles, backward_norm_task, &plan);
    fa_parallel_for(&forward->workers, kv_heads * plan.key_lanes, backward_keys_task, &plan);
    fa_parallel_for(&forward->workers, q_heads * plan.q_chunks, backward_rows_task, &plan);
    store_per_head(forward, &args->d_alibi_slopes, plan.d_slopes, plan.key_lanes);
    store_per_head(forward, &args->d_sinks, plan.d_sinks, plan.q_chunks);
    if (args->d_bias.data) {
        bias_blocks blocks = bias_blocks_of(&plan);
        fa_parallel_for(&forward->workers, blocks.batches * blocks.heads * blocks.row_blocks * blocks.col_blocks,
                        backward_bias_task, &blocks);
    }
}

#endif
