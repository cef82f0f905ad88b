// What the fused backward keeps in its workspace, and how it is laid out. All of it is O(L * D).
#ifndef FA_BACKWARD_PLAN_H
#define FA_BACKWARD_PLAN_H

#include "cpu/kernels/packing.h"
#include "cpu/kernels/scores.h"

enum {
    kGradM = 64,                // query rows of a tile: a multiple of 16, for dropout_tile
    kGradN = 256,               // keys of a block
    kScoreStride = kGradN + 16, // 17 cache lines: P^T is read down a column, so rows must not share L1 sets
    kGradStrips = kGradM / 4,   // strips of kMicroRows >= 4 rows in a tile, at most
    kLargeLse = 64,             // beyond it, lse's rounding (4e-6) is more than P's own
    kGradTasks = 16,            // tasks that keep a machine busy; below it the keys of a head are split into lanes,
    kMaxKeyLanes = 8,           // each with a d_q of its own
};

typedef struct backward_scratch { // of one worker
    real *p, *ds;                 // [kGradM][kScoreStride] P where dropout keeps it, dS
    operand *p_down, *ds_down;    // [kGradM / kDepth][kScoreStride]; p and ds themselves where an operand is a real
    operand *ds_along;            // [kGradM][kScoreStride / kDepth]; the same
    real *keep;                   // [kGradM][kScoreStride]
    real *d_k, *d_v;              // [kGradN][d_stride], [kGradN][dv_stride]
    real *capped, *row;           // [kGradN]
    real *pack;                   // [kMicroCols][max(d_stride, dv_stride)], of reals or operands
    double *d_bias;               // [kGradM][kGradN]: any number of heads and tiles adds up here
} backward_scratch;

typedef struct backward_plan {
    const fa_backward_args *args;
    int64_t d_stride, dv_stride; // head_dim, head_dim_v in whole panels
    int64_t q_chunks, k_chunks;  // packing tasks per head
    int64_t q_tiles;             // per head
    int64_t key_lanes;          // lane c of a (b, h_kv) takes key blocks c, c + key_lanes, …; a function of shape alone
    packed q, d_o;              // along head_dim; q scaled by pack_scale(softmax_scale)
    packed q_down, d_o_down, k; // down the rows; q_down is q, and d_o_down d_o, where an operand is a real
    packed k_panels, v_panels;
    packed lse, delta; // one value a row: lse (+inf where no key is visible), rowsum(d_o * o) - d_lse
    packed norm;       // one value a row: 1 / sum of e^(s - lse), which is 1 but for the rounding of lse
    packed d_q;        // [key_lanes * Hq] heads of rows: d_q / softmax_scale of each key lane
    double *d_slopes;  // [B][Hq][key_lanes]
    double *d_sinks;   // [B][Hq][q_chunks]
    char *scratch;
    size_t scratch_bytes, workspace_bytes;
} backward_plan;

static backward_scratch backward_scratch_at(const backward_plan *plan, int32_t worker, size_t *bytes) {
    fa_arena arena = {plan->scratch ? plan->scratch + (size_t)worker * plan->scratch_bytes : NULL, 0};
    const size_t tile_bytes = kGradM * kScoreStride * sizeof(real);
    backward_scratch scratch;
    scratch.p = fa_take(&arena, tile_bytes);
    scratch.ds = fa_take(&arena, tile_bytes);
    scratch.p_down = kDepth == 1 ? (operand *)scratch.p : fa_take(&arena, tile_bytes / kDepth);
    scratch.ds_down = kDepth == 1 ? (operand *)scratch.ds : fa_take(&arena, tile_bytes / kDepth);
    scratch.ds_along = kDepth == 1 ? (operand *)scratch.ds : fa_take(&arena, tile_bytes / kDepth);
    scratch.keep = fa_take(&arena, plan->args->forward.dropout_p > 0 ? tile_bytes : 0);
    scratch.d_k = fa_take(&arena, (size_t)(kGradN * plan->d_stride) * sizeof(real));
    scratch.d_v = fa_take(&arena, (size_t)(kGradN * plan->dv_stride) * sizeof(real));
    scratch.capped = fa_take(&arena, kGradN * sizeof(real));
    scratch.row = fa_take(&arena, kGradN * sizeof(real));
    scratch.pack = fa_take(&arena, (size_t)(kMicroCols * fa_max(plan->d_stride, plan->dv_stride)) * sizeof(real));
    scratch.d_bias = fa_take(&arena, plan->args->d_bias.data ? kGradM * kGradN * sizeof(double) : 0);
    if (bytes) *bytes = arena.used_bytes;
    return scratch;
}

static backward_plan backward_plan_of(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    const int64_t hq = forward->heads_q, hkv = forward->heads_kv;
    backward_plan plan = {.args = args};
    plan.d_stride = fa_round_up(forward->head_dim, kMicroCols);
    plan.dv_stride = fa_round_up(forward->head_dim_v, kMicroCols);
    plan.q_chunks = fa_ceil_div(forward->seqlen_q, kPackRows);
    plan.q_tiles = fa_ceil_div(forward->seqlen_q, kGradM);
    plan.k_chunks = fa_ceil_div(forward->seqlen_k, kPackRows);
    const int64_t key_blocks = fa_max(1, fa_ceil_div(forward->seqlen_k, kGradN));
    const int64_t wanted = fa_ceil_div(kGradTasks, fa_max(1, forward->batch * hkv));
    plan.key_lanes = fa_min(fa_min(wanted, kMaxKeyLanes), key_blocks);
    fa_arena arena = {forward->workspace, 0};
    plan.q = packed_take(&arena, forward, kSideQ, hq, plan.d_stride / kDepth);
    plan.d_o = packed_take(&arena, forward, kSideQ, hq, plan.dv_stride / kDepth);
    plan.q_down = kDepth == 1 ? plan.q : packed_take(&arena, forward, kSideQ, hq, plan.d_stride / kDepth);
    plan.d_o_down = kDepth == 1 ? plan.d_o : packed_take(&arena, forward, kSideQ, hq, plan.dv_stride / kDepth);
    plan.lse = packed_take(&arena, forward, kSideQ, hq, 1);
    plan.delta = packed_take(&arena, forward, kSideQ, hq, 1);
    plan.norm = packed_take(&arena, forward, kSideQ, hq, 1);
    plan.k = packed_take(&arena, forward, kSideK, hkv, plan.d_stride / kDepth);
    plan.k_panels = packed_take(&arena, forward, kSideK, hkv, depth_units(forward->head_dim));
    plan.v_panels = packed_take(&arena, forward, kSideK, hkv, depth_units(forward->head_dim_v));
    plan.d_q = packed_take(&arena, forward, kSideQ, plan.key_lanes * hq, plan.d_stride);
    plan.d_slopes = fa_take(&arena, (size_t)(forward->batch * hq * plan.key_lanes) * sizeof(double));
    plan.d_sinks = fa_take(&arena, (size_t)(forward->batch * hq * plan.q_chunks) * sizeof(double));
    backward_scratch_at(&plan, 0, &plan.scratch_bytes);
    plan.scratch = fa_take(&arena, plan.scratch_bytes * (size_t)fa_worker_count(&forward->workers));
    plan.workspace_bytes = arena.used_bytes;
    return plan;
}

#endif
