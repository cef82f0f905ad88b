// Attention in three steps with the score matrix in memory: the baseline. Vectorised loops over L1-sized blocks, four rows
// to a load, accumulating in memory.
#ifndef FA_NAIVE_H
#define FA_NAIVE_H

#include "cpu/kernels/packing.h"
#include "cpu/kernels/scores.h"

enum { kNaiveRows = 16, kNaiveCols = 512 }; // rows of a task, a multiple of 16 for dropout_tile; columns of an L1 block

typedef struct naive_plan {
    const fa_forward_args *args;
    const fa_backward_args *backward; // NULL in the forward pass
    int64_t row_blocks;               // of seqlen_q
    int64_t ld;                       // seqlen_k in whole panels
    int64_t d_stride, dv_stride;      // head_dim, head_dim_v in whole vectors
    packed q, k, v, d_o;              // rows; q scaled by softmax_scale
    real *k_t, *v_t;                  // [B][Hkv][D or Dv][ld]: transposed
    real *p, *ds, *capped;            // [B][Hq][Lq][ld]; capped only with a softcap
    double *slope_sums, *sink_sums;   // [B][Hq][Lq]
    real *scratch;                    // [workers][kNaiveRows][max(ld, d_stride, dv_stride)]
    size_t workspace_bytes;
} naive_plan;

static int64_t naive_scratch_row(const naive_plan *plan) {
    return fa_max(plan->ld, fa_max(plan->d_stride, plan->dv_stride));
}

static naive_plan naive_plan_of(const fa_forward_args *args, const fa_backward_args *backward) {
    naive_plan plan = {.args = args, .backward = backward};
    plan.row_blocks = fa_ceil_div(args->seqlen_q, kNaiveRows);
    plan.ld = fa_round_up(args->seqlen_k, fa_max(kMicroCols, 16));
    plan.d_stride = fa_round_up(args->head_dim, kLanes);
    plan.dv_stride = fa_round_up(args->head_dim_v, kLanes);
    const int64_t rows = args->batch * args->heads_q * args->seqlen_q;
    const size_t matrix_bytes = (size_t)(rows * plan.ld) * sizeof(real);
    const size_t column_bytes = (size_t)(args->batch * args->heads_kv * plan.ld) * sizeof(real);
    fa_arena arena = {args->workspace, 0};
    plan.q = packed_take(&arena, args, kSideQ, args->heads_q, plan.d_stride);
    plan.v = packed_take(&arena, args, kSideK, args->heads_kv, plan.dv_stride);
    plan.k_t = fa_take(&arena, column_bytes * (size_t)args->head_dim);
    plan.p = fa_take(&arena, matrix_bytes);
    if (backward) {
        plan.k = packed_take(&arena, args, kSideK, args->heads_kv, plan.d_stride);
        plan.d_o = packed_take(&arena, args, kSideQ, args->heads_q, plan.dv_stride);
        plan.v_t = fa_take(&arena, column_bytes * (size_t)args->head_dim_v);
        plan.ds = fa_take(&arena, matrix_bytes);
        plan.capped = fa_take(&arena, args->softcap > 0 ? matrix_bytes : 0);
        plan.slope_sums = fa_take(&arena, (size_t)rows * sizeof(double));
        plan.sink_sums = fa_take(&arena, (size_t)rows * sizeof(double));
    }
    const int64_t scratch_rows = (int64_t)fa_worker_count(&args->workers) * kNaiveRows;
    plan.scratch = fa_take(&arena, (size_t)(scratch_rows * naive_scratch_row(&plan)) * sizeof(real));
    plan.workspace_bytes = arena.used_bytes;
    return plan;
}

// c[rows][n] (+)= a[rows][depth] b[depth][n], where a's element (r, k) is a[r * a_row + k * a_depth]. n: whole vectors.
static void naive_product(int64_t rows, int64_t n, int64_t depth, const real *a, int64_t a_row, int64_t a_depth,
                          const real *b, int64_t b_row, real *c, int64_t c_row, int accumulate) {
    for (int64_t r = 0; r < rows && !accumulate; ++r) memset(c + r * c_row, 0, (size_t)n * sizeof(real));
    for (int64_t j0 = 0; j0 < n; j0 += kNaiveCols) {
        const int64_t j1 = fa_min(j0 + kNaiveCols, n);
        for (int64_t r0 = 0; r0 < rows; r0 += 4) {
            const int64_t r1 = fa_min(r0 + 4, rows);
            for (int64_t k = 0; k < depth; ++k)
                for (int64_t j = j0; j < j1; j += kLanes) {
                    const vreal b_kj = v_load(b + k * b_row + j);
                    for (int64_t r = r0; r < r1; ++r) {
                        const vreal a_rk = v_set1(a[r * a_row + k * a_depth]);
                        v_store(c + r * c_row + j, v_fma(a_rk, b_kj, v_load(c + r * c_row + j)));
                    }
                }
        }
    }
}

// ---- operands -------------------------------------------------------------------------------------------------------

static void naive_transpose(const naive_plan *plan, real *dst, const fa_tensor *src, const fa_sequence *seq,
                            int64_t h_kv, int64_t width) {
    const fa_dtype dtype = plan->args->dtype;
    memset(dst, 0, (size_t)(width * plan->ld) * sizeof(real));
    for (int64_t j = 0; j < seq->len_k; ++j) {
        const int64_t at = fa_row_offset(src, seq->batch_index, h_kv, seq->row_k + j);
        for (int64_t d = 0; d < width; ++d) dst[d * plan->ld + j] = (real)fa_load(src->data, dtype, at + d);
    }
}

static void naive_pack_k_task(void *arg, int64_t task, int32_t worker) { // task: (b, h_kv)
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const int64_t b = task / args->heads_kv, h_kv = task % args->heads_kv;
    const fa_sequence seq = fa_sequence_at(args, b);
    (void)worker;
    naive_transpose(plan, plan->k_t + task * args->head_dim * plan->ld, &args->k, &seq, h_kv, args->head_dim);
    const pack_source v = {args, &args->v, kSideK, b, h_kv, 0, seq.len_k, args->head_dim_v, seq, NULL};
    pack_along(pack_target(&plan->v, &v), plan->v.row_stride, &v, 1);
    if (!plan->backward) return;
    naive_transpose(plan, plan->v_t + task * args->head_dim_v * plan->ld, &args->v, &seq, h_kv, args->head_dim_v);
    const pack_source k = {args, &args->k, kSideK, b, h_kv, 0, seq.len_k, args->head_dim, seq, NULL};
    pack_along(pack_target(&plan->k, &k), plan->k.row_stride, &k, 1);
}

static void naive_pack_q_task(void *arg, int64_t task, int32_t worker) { // task: (b, h)
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const int64_t b = task / args->heads_q, h = task % args->heads_q;
    const fa_sequence seq = fa_sequence_at(args, b);
    (void)worker;
    const pack_source q = {args, &args->q, kSideQ, b, h, 0, seq.len_q, args->head_dim, seq, NULL};
    pack_along(pack_target(&plan->q, &q), plan->q.row_stride, &q, (real)args->softmax_scale);
    if (!plan->backward) return;
    const pack_source d_o = {args, &plan->backward->d_o, kSideQ, b, h, 0, seq.len_q, args->head_dim_v, seq, &args->lse};
    pack_along(pack_target(&plan->d_o, &d_o), plan->d_o.row_stride, &d_o, 1);
}

// ---- a block of rows of one head ------------------------------------------------------------------------------------

typedef struct naive_block {
    int64_t b, h, h_kv, row0, rows;
    int64_t q_row, k_row;    // first packed row of the block, of the sequence's keys
    int64_t matrix, columns; // offsets of the block in p, ds, capped; index of (b, h_kv) in k_t, v_t
    score_rule rule;
    real *scratch; // [kNaiveRows][ld]
} naive_block;

static naive_block naive_block_of(const naive_plan *plan, int64_t task, int32_t worker) {
    const fa_forward_args *args = plan->args;
    naive_block block;
    const fa_place place = fa_place_of(task, args->heads_q, plan->row_blocks);
    block.row0 = place.part * kNaiveRows, block.h = place.head, block.b = place.b;
    block.h_kv = block.h / (args->heads_q / args->heads_kv);
    block.rule = score_rule_of(args, block.b, block.h);
    block.rows = fa_min(kNaiveRows, block.rule.seq.len_q - block.row0);
    block.q_row = packed_first_row(args, kSideQ, block.b) + block.row0;
    block.k_row = packed_first_row(args, kSideK, block.b);
    block.matrix = ((block.b * args->heads_q + block.h) * args->seqlen_q + block.row0) * plan->ld;
    block.columns = block.b * args->heads_kv + block.h_kv;
    block.scratch = plan->scratch + worker * kNaiveRows * naive_scratch_row(plan);
    return block;
}

// Step 1: scores = q k^T, modified and masked.
static void naive_scores_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const naive_block block = naive_block_of(plan, task, worker);
    if (block.rows <= 0) return;
    real *s = plan->p + block.matrix;
    naive_product(block.rows, plan->ld, args->head_dim, packed_at(&plan->q, block.h, block.q_row), plan->d_stride, 1,
                  plan->k_t + block.columns * args->head_dim * plan->ld, plan->ld, s, plan->ld, 0);
    for (int64_t r = 0; r < block.rows; ++r) {
        real *capped = plan->backward && args->softcap > 0 ? plan->capped + block.matrix + r * plan->ld : NULL;
        finish_scores(&block.rule, s + r * plan->ld, block.row0 + r, 0, plan->ld, capped, block.scratch);
    }
}

static const real *naive_keep(const naive_plan *plan, const naive_block *block) {
    const fa_forward_args *args = plan->args;
    if (args->dropout_p == 0) return NULL;
    dropout_tile(block->scratch, plan->ld, args, block->b * args->heads_q + block->h, block->row0, block->rows, 0,
                 plan->ld, kept_scale(args));
    return block->scratch;
}

#include "cpu/kernels/naive_forward.h"

#include "cpu/kernels/naive_backward.h"

#endif
