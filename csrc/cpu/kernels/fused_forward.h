// Forward with an online softmax: no score matrix. Source: Dao, "FlashAttention-2" (2023), algorithm 1.
//
//   first, per (b, h_kv): K packed into transposed panels, V into padded rows (float32 V of full panels is used in place);
//                         where a head has one tile of rows, as in decoding, its task packs block by block instead
//   then, per task (b, h, tile of kBlockM query rows):
//     for each block of kBlockN keys that some row sees                      the K panel and V block stay in L2
//       for each strip of kMicroRows rows                                    its kMicroRows x kBlockN scores stay in L1
//         s = q k^T over the columns the strip sees, modified, masked at the interval's ends
//         m' = max(m, rowmax s);  o *= e^(m - m');  p = e^(s - m');  l = l e^(m - m') + rowsum p
//         o += dropout(p) v
//     o /= l;  lse = m + ln l                                                a sink joins l here
#ifndef FA_FUSED_FORWARD_H
#define FA_FUSED_FORWARD_H

#include "cpu/kernels/packing.h"
#include "cpu/kernels/scores.h"

enum {
    kBlockM = 64,  // a multiple of 16, for dropout_tile; small, so that few tasks wait for a long one
    kBlockN = 256, // K and V block of float32, head_dim 128: 256 KiB, half of a 512 KiB L2
};

typedef struct forward_scratch { // of one worker
    operand *q;                  // [kBlockM][q_units]
    real *acc_o;                 // [kBlockM][dv_stride]
    real *s;                     // [kMicroRows][kBlockN]
    operand *p;                  // [kMicroRows][kBlockN / kDepth]; s itself where an operand is a real
    real *keep;                  // [kBlockM][kBlockN]
    real *row;                   // [kBlockN]
    operand *pack;               // [kMicroCols][q_units]
    operand *k_block, *v_block;  // kBlockN keys, packed by the task that uses them
    real *row_max, *row_sum;     // [kBlockM], natural units
} forward_scratch;

typedef struct forward_plan {
    const fa_forward_args *args;
    int64_t q_tiles, k_chunks;  // per head
    int64_t q_units, dv_stride; // operands of a row of q, in whole vectors; head_dim_v in whole panels
    int v_in_place;
    int shared_packs; // k_panels and v_rows hold whole tensors; else each task packs a block at a time
    packed k_panels, v_rows;
    char *scratch;
    size_t scratch_bytes; // per worker
    size_t workspace_bytes;
} forward_plan;

static forward_scratch forward_scratch_at(const forward_plan *plan, int32_t worker, size_t *bytes) {
    fa_arena arena = {plan->scratch ? plan->scratch + (size_t)worker * plan->scratch_bytes : NULL, 0};
    forward_scratch scratch;
    scratch.q = fa_take(&arena, (size_t)(kBlockM * plan->q_units) * sizeof(operand));
    scratch.acc_o = fa_take(&arena, (size_t)(kBlockM * plan->dv_stride) * sizeof(real));
    scratch.s = fa_take(&arena, kMicroRows * kBlockN * sizeof(real));
    scratch.p = kDepth == 1 ? (operand *)scratch.s : fa_take(&arena, kMicroRows * kBlockN / kDepth * sizeof(operand));
    scratch.keep = fa_take(&arena, (plan->args->dropout_p > 0 ? kBlockM * kBlockN : 0) * sizeof(real));
    scratch.row = fa_take(&arena, kBlockN * sizeof(real));
    scratch.pack = fa_take(&arena, (size_t)(kMicroCols * plan->q_units) * sizeof(operand));
    const size_t block_rows = plan->shared_packs ? 0 : kBlockN;
    scratch.k_block = fa_take(&arena, block_rows * (size_t)depth_units(plan->args->head_dim) * sizeof(operand));
    scratch.v_block =
        fa_take(&arena, plan->v_in_place ? 0 : block_rows * (size_t)(plan->dv_stride / kDepth) * sizeof(operand));
    scratch.row_max = fa_take(&arena, kBlockM * sizeof(real));
    scratch.row_sum = fa_take(&arena, kBlockM * sizeof(real));
    if (bytes) *bytes = arena.used_bytes;
    return scratch;
}

static forward_plan forward_plan_of(const fa_forward_args *args) {
    forward_plan plan = {.args = args};
    plan.q_tiles = fa_ceil_div(args->seqlen_q, kBlockM);
    plan.k_chunks = fa_ceil_div(args->seqlen_k, kPackRows);
    plan.q_units = fa_round_up(depth_units(args->head_dim), kLanes);
    plan.dv_stride = fa_round_up(args->head_dim_v, kMicroCols);
    plan.v_in_place = kDepth == 1 && args->dtype == REAL_DTYPE && args->head_dim_v % kMicroCols == 0;
    fa_arena arena = {args->workspace, 0};
    plan.shared_packs = plan.q_tiles > 1;
    if (plan.shared_packs) {
        plan.k_panels = packed_take(&arena, args, kSideK, args->heads_kv, depth_units(args->head_dim));
        if (!plan.v_in_place) plan.v_rows = packed_take(&arena, args, kSideK, args->heads_kv, plan.dv_stride / kDepth);
    }
    forward_scratch_at(&plan, 0, &plan.scratch_bytes);
    plan.scratch = fa_take(&arena, plan.scratch_bytes * (size_t)fa_worker_count(&args->workers));
    plan.workspace_bytes = arena.used_bytes;
    return plan;
}

static void forward_pack_task(void *arg, int64_t task, int32_t worker) {
    const forward_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const fa_place place = fa_place_of(task, args->heads_kv, plan->k_chunks);
    const int64_t row0 = place.part * kPackRows, head = place.head, b = place.b;
    const fa_sequence seq = fa_sequence_at(args, b);
    const int64_t n = fa_min(kPackRows, seq.len_k - row0);
    if (n <= 0) return;
    const forward_scratch scratch = forward_scratch_at(plan, worker, NULL);
    const pack_source k = {args, &args->k, kSideK, b, head, row0, n, args->head_dim, seq, NULL};
    const pack_source v = {args, &args->v, kSideK, b, head, row0, n, args->head_dim_v, seq, NULL};
    pack_panels(pack_target(&plan->k_panels, &k), &k, scratch.pack);
    if (!plan->v_in_place) pack_down(pack_target(&plan->v_rows, &v), plan->v_rows.row_stride, &v);
}

// p = dropout(e^(s - m')) over n columns of one row, with the running maximum and sum; o is rescaled where the maximum grew.
// keep: NULL without dropout.
static inline void softmax_row(const real *s, operand *p, const real *keep, int64_t n, real *row_max, real *row_sum,
                               real *acc_o, int64_t o_cols) {
    vreal max0 = v_set1(-INFINITY), max1 = max0;
    for (int64_t c = 0; c < n; c += kMicroCols) {
        for (int k = 0; k < kMicroVectors; k += 2) {
            max0 = v_max(v_load(s + c + k * kLanes), max0);
            max1 = v_max(v_load(s + c + (k + 1) * kLanes), max1);
        }
    }
    const real block_max = v_hmax(v_max(max0, max1));
    if (block_max > *row_max) {
        if (*row_sum != 0) {
            const real alpha = v_hmax(v_exp2(v_set1((*row_max - block_max) * kLog2E)));
            *row_sum *= alpha;
            for (int64_t c = 0; c < o_cols; c += kLanes) v_store(acc_o + c, v_mul(v_set1(alpha), v_load(acc_o + c)));
        }
        *row_max = block_max;
    }
    // s - max before the product with log2(e): scores may be as large as an additive mask of -FLT_MAX
    const vreal log2e = v_set1(kLog2E), max = v_set1(*row_max == -INFINITY ? 0 : *row_max);
    vreal sum0 = v_set1(0), sum1 = sum0;
    for (int64_t c = 0; c < n; c += kMicroCols) {
        for (int k = 0; k < kMicroVectors; k += 2) {
            const int64_t at = c + k * kLanes;
            vreal p0 = v_exp2(v_mul(v_sub(v_load(s + at), max), log2e));
            vreal p1 = v_exp2(v_mul(v_sub(v_load(s + at + kLanes), max), log2e));
            sum0 = v_add(sum0, p0);
            sum1 = v_add(sum1, p1);
            if (keep) {
                p0 = v_mul(p0, v_load(keep + at));
                p1 = v_mul(p1, v_load(keep + at + kLanes));
            }
            v_store_along(p + at / kDepth, p0, p1);
        }
    }
    *row_sum += v_hsum(v_add(sum0, sum1));
}

// kBlockN keys from n0 on.
typedef struct key_block {
    int64_t n0;
    const operand *k_panels, *v;
    int64_t v_stride; // from one row of operands to the next
} key_block;

static key_block key_block_at(const forward_plan *plan, const forward_scratch *scratch, const fa_sequence *seq,
                              int64_t b, int64_t h_kv, int64_t n0) {
    const fa_forward_args *args = plan->args;
    const int64_t row = packed_first_row(args, kSideK, b) + n0;
    key_block block = {n0, NULL, NULL, plan->dv_stride};
    if (plan->shared_packs) {
        block.k_panels = operands_at(&plan->k_panels, h_kv, row);
        block.v = plan->v_in_place ? NULL : operands_at(&plan->v_rows, h_kv, row);
    } else {
        const int64_t n = fa_min(kBlockN, seq->len_k - n0);
        const pack_source k = {args, &args->k, kSideK, b, h_kv, n0, n, args->head_dim, *seq, NULL};
        const pack_source v = {args, &args->v, kSideK, b, h_kv, n0, n, args->head_dim_v, *seq, NULL};
        pack_panels(scratch->k_block, &k, scratch->pack);
        if (!plan->v_in_place) pack_down(scratch->v_block, plan->dv_stride / kDepth, &v);
        block.k_panels = scratch->k_block, block.v = scratch->v_block;
    }
    if (plan->v_in_place) {
        const int64_t offset = fa_row_offset(&args->v, seq->batch_index, h_kv, seq->row_k + n0);
        block.v = (const operand *)args->v.data + offset, block.v_stride = args->v.stride_l;
    }
    return block;
}

// Rows [r0, r0 + n) of the tile at row m0 against a block of keys.
static void forward_strip(const forward_plan *plan, const forward_scratch *scratch, const score_rule *rule,
                          const key_block *block, int64_t m0, int64_t r0, int64_t n) {
    const fa_forward_args *args = plan->args;
    const int64_t lo = fa_max(fa_visible_keys(args, &rule->seq, m0 + r0).lo - block->n0, 0) / kDepth * kDepth;
    const int64_t hi = fa_min(fa_visible_keys(args, &rule->seq, m0 + r0 + n - 1).hi - block->n0, kBlockN);
    if (lo >= hi) return;
    const int64_t first = lo / kMicroCols * kMicroCols; // the columns computed: whole panels
    const int64_t cols = fa_round_up(hi - first, kMicroCols), units = depth_units(args->head_dim);
    for (int64_t c = 0; c < cols; c += kMicroCols)
        micro_kernel(n, units, scratch->q + r0 * plan->q_units, plan->q_units, 1, block->k_panels + (first + c) * units,
                     kMicroCols, scratch->s + c, kBlockN, 0);
    for (int64_t r = r0; r < r0 + n; ++r) {
        real *s = scratch->s + (r - r0) * kBlockN;
        finish_scores(rule, s, m0 + r, block->n0 + first, cols, NULL, scratch->row);
        softmax_row(s, scratch->p + (r - r0) * kBlockN / kDepth,
                    args->dropout_p > 0 ? scratch->keep + r * kBlockN + first : NULL, cols, &scratch->row_max[r],
                    &scratch->row_sum[r], scratch->acc_o + r * plan->dv_stride, plan->dv_stride);
    }
    for (int64_t d = 0; d < plan->dv_stride; d += kMicroCols)
        micro_kernel(n, depth_units(hi - lo), scratch->p + (lo - first) / kDepth, kBlockN / kDepth, 1,
                     block->v + lo / kDepth * block->v_stride + d, block->v_stride,
                     scratch->acc_o + r0 * plan->dv_stride + d, plan->dv_stride, 1);
}

// o and lse of one row from its unnormalised sum; the sink is one more term of l.
static void forward_finish_row(const fa_forward_args *args, const fa_sequence *seq, int64_t h, int64_t row,
                               const real *acc_o, real row_max, real row_sum) {
    real weight = 1;
    const real sink = sink_of(args, h);
    if (sink != -INFINITY) {
        const real joint = sink > row_max ? sink : row_max;
        weight = real_exp(row_max - joint);
        row_sum = row_sum * weight + real_exp(sink - joint);
        row_max = joint;
    }
    const int64_t lse_at = fa_row_offset(&args->lse, seq->batch_index, h, seq->row_q + row);
    store_tensor_row(&args->o, args->dtype, seq->batch_index, h, seq->row_q + row, acc_o, args->head_dim_v,
                     row_sum == 0 ? 0 : weight * kept_scale(args) / row_sum); // a NaN sum stays NaN
    ((real *)args->lse.data)[lse_at] = row_sum == 0 ? -INFINITY : row_max + real_log(row_sum);
}

static void forward_tile_task(void *arg, int64_t task, int32_t worker) {
    const forward_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const fa_place place = fa_place_of(task, args->heads_q, plan->q_tiles);
    const int64_t tile = plan->q_tiles - 1 - place.part; // causal: the longest tiles of a head first
    const int64_t h = place.head, b = place.b;
    const int64_t h_kv = h / (args->heads_q / args->heads_kv), m0 = tile * kBlockM;
    const score_rule rule = score_rule_of(args, b, h);
    const fa_sequence *seq = &rule.seq;
    const forward_scratch scratch = forward_scratch_at(plan, worker, NULL);
    const int64_t rows = fa_max(0, fa_min(kBlockM, seq->len_q - m0));

    const pack_source q = {args, &args->q, kSideQ, b, h, m0, rows, args->head_dim, *seq, NULL};
    pack_along(scratch.q, plan->q_units, &q, pack_scale((real)args->softmax_scale));
    for (int64_t r = 0; r < rows; ++r) scratch.row_max[r] = -INFINITY, scratch.row_sum[r] = 0;
    memset(scratch.acc_o, 0, (size_t)(rows * plan->dv_stride) * sizeof(real));

    const int64_t col_lo = rows ? fa_visible_keys(args, seq, m0).lo : 0;
    const int64_t col_hi = rows ? fa_visible_keys(args, seq, m0 + rows - 1).hi : 0;
    for (int64_t n0 = col_lo / kBlockN * kBlockN; n0 < col_hi; n0 += kBlockN) {
        if (args->dropout_p > 0)
            dropout_tile(scratch.keep, kBlockN, args, b * args->heads_q + h, m0, rows, n0, kBlockN, 1);
        const key_block block = key_block_at(plan, &scratch, seq, b, h_kv, n0);
        for (int64_t r0 = 0; r0 < rows; r0 += kMicroRows)
            forward_strip(plan, &scratch, &rule, &block, m0, r0, fa_min(kMicroRows, rows - r0));
    }
    for (int64_t r = 0; r < rows; ++r)
        forward_finish_row(args, seq, h, m0 + r, scratch.acc_o + r * plan->dv_stride, scratch.row_max[r],
                           scratch.row_sum[r]);
}

static size_t fused_forward_workspace_bytes(const fa_forward_args *args) {
    return forward_plan_of(args).workspace_bytes;
}

static void fused_forward_run(const fa_forward_args *args) {
    forward_plan plan = forward_plan_of(args);
    if (plan.shared_packs)
        fa_parallel_for(&args->workers, args->batch * args->heads_kv * plan.k_chunks, forward_pack_task, &plan);
    fa_parallel_for(&args->workers, args->batch * args->heads_q * plan.q_tiles, forward_tile_task, &plan);
}

#endif
