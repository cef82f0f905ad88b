// The naive backward pass: P and dS as whole matrices, then one product for each gradient. Included by naive.h.

// Step 2: p = e^(s - lse) over its own row sum (1 but for the rounding of lse), dS = p (dropout(d_o v^T) - delta), then p = dropout(p).
static void naive_ds_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const naive_block block = naive_block_of(plan, task, worker);
    if (block.rows <= 0) return;
    const fa_sequence *seq = &block.rule.seq;
    const real *d_o = packed_at(&plan->d_o, block.h, block.q_row);
    naive_product(block.rows, plan->ld, args->head_dim_v, d_o, plan->dv_stride, 1,
                  plan->v_t + block.columns * args->head_dim_v * plan->ld, plan->ld, plan->ds + block.matrix, plan->ld,
                  0);
    const real *keep = naive_keep(plan, &block);
    for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t row = block.row0 + r, sum_at = (block.b * args->heads_q + block.h) * args->seqlen_q + row;
        const int64_t o_at = fa_row_offset(&args->o, seq->batch_index, block.h, seq->row_q + row);
        const real lse =
            ((const real *)args->lse.data)[fa_row_offset(&args->lse, seq->batch_index, block.h, seq->row_q + row)];
        double delta = 0, slope_sum = 0;
        for (int64_t d = 0; d < args->head_dim_v; ++d)
            delta += fa_load(args->o.data, args->dtype, o_at + d) * (double)d_o[r * plan->dv_stride + d];
        if (plan->backward->d_lse.data && lse != -INFINITY)
            delta -=
                (double)((const real *)plan->backward->d_lse
                             .data)[fa_row_offset(&plan->backward->d_lse, seq->batch_index, block.h, seq->row_q + row)];
        real *p = plan->p + block.matrix + r * plan->ld, *ds = plan->ds + block.matrix + r * plan->ld;
        real sum = lse == -INFINITY ? 1 : real_exp(sink_of(args, block.h) - lse);
        for (int64_t j = 0; j < plan->ld; ++j) {
            p[j] = lse == -INFINITY ? 0 : real_exp(p[j] - lse);
            sum += p[j];
        }
        for (int64_t j = 0; j < plan->ld; ++j) {
            const real weight = keep ? keep[r * plan->ld + j] : 1;
            p[j] /= sum;
            ds[j] = p[j] * (weight * ds[j] - (real)delta);
            p[j] *= weight;
            slope_sum -= (double)ds[j] * fabs((double)(row + seq->len_k - seq->len_q - j));
        }
        plan->slope_sums[sum_at] = slope_sum;
        plan->sink_sums[sum_at] = 0;
        if (args->sinks.data && lse != -INFINITY)
            plan->sink_sums[sum_at] = -exp((double)sink_of(args, block.h) - (double)lse) / (double)sum * delta;
    }
}

// Through the softcap, once the bias has taken its gradient; then d_q = softmax_scale dS k.
static void naive_d_q_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const naive_block block = naive_block_of(plan, task, worker);
    if (block.rows <= 0) return;
    const fa_sequence *seq = &block.rule.seq;
    real *ds = plan->ds + block.matrix;
    for (int64_t j = 0; args->softcap > 0 && j < block.rows * plan->ld; ++j)
        ds[j] *= 1 - plan->capped[block.matrix + j] * plan->capped[block.matrix + j];
    naive_product(block.rows, plan->d_stride, seq->len_k, ds, plan->ld, 1, packed_at(&plan->k, block.h_kv, block.k_row),
                  plan->d_stride, block.scratch, plan->d_stride, 0);
    for (int64_t r = 0; r < block.rows; ++r) {
        store_tensor_row(&plan->backward->d_q, args->dtype, seq->batch_index, block.h, seq->row_q + block.row0 + r,
                         block.scratch + r * plan->d_stride, args->head_dim, (real)args->softmax_scale);
    }
}

// gradient[keys] = sum over the heads of the group of matrix^T rows, for kNaiveRows keys.
static void naive_key_gradient(const naive_plan *plan, const real *matrix, const packed *rows, int64_t width,
                               const fa_tensor *gradient, const fa_sequence *seq, int64_t b, int64_t h_kv, int64_t key0,
                               real *scratch) {
    const fa_forward_args *args = plan->args;
    const int64_t group = args->heads_q / args->heads_kv, keys = fa_min(kNaiveRows, seq->len_k - key0);
    const int64_t first = packed_first_row(args, kSideQ, b);
    for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h)
        naive_product(keys, rows->row_stride, seq->len_q,
                      matrix + (b * args->heads_q + h) * args->seqlen_q * plan->ld + key0, 1, plan->ld,
                      packed_at(rows, h, first), rows->row_stride, scratch, rows->row_stride, h > h_kv * group);
    for (int64_t key = 0; key < keys; ++key) {
        store_tensor_row(gradient, args->dtype, seq->batch_index, h_kv, seq->row_k + key0 + key,
                         scratch + key * rows->row_stride, width, 1);
    }
}

static void naive_d_kv_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const fa_place place = fa_place_of(task, args->heads_kv, fa_ceil_div(args->seqlen_k, kNaiveRows));
    const int64_t key0 = place.part * kNaiveRows, h_kv = place.head, b = place.b;
    const fa_sequence seq = fa_sequence_at(args, b);
    real *scratch = plan->scratch + worker * kNaiveRows * naive_scratch_row(plan);
    if (key0 >= seq.len_k) return;
    naive_key_gradient(plan, plan->p, &plan->d_o, args->head_dim_v, &plan->backward->d_v, &seq, b, h_kv, key0, scratch);
    naive_key_gradient(plan, plan->ds, &plan->q, args->head_dim, &plan->backward->d_k, &seq, b, h_kv, key0, scratch);
}

// One row of d_bias (an axis of stride 0 is summed over), from dS before it goes through the softcap.
static void naive_bias_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const fa_bias *d_bias = &plan->backward->d_bias;
    const int64_t heads = d_bias->stride_h ? args->heads_q : 1, rows = d_bias->stride_q ? args->seqlen_q : 1;
    const int64_t row = task % rows, head = task / rows % heads, batch = task / rows / heads;
    double *sum = (double *)(plan->scratch + worker * kNaiveRows * naive_scratch_row(plan)); // its 16 rows hold one
    for (int64_t j = 0; j < fa_max(1, args->seqlen_k); ++j) sum[j] = 0;
    for (int64_t b = d_bias->stride_b ? batch : 0; b < (d_bias->stride_b ? batch + 1 : args->batch); ++b) {
        const fa_sequence seq = fa_sequence_at(args, b);
        for (int64_t h = d_bias->stride_h ? head : 0; h < (d_bias->stride_h ? head + 1 : args->heads_q); ++h)
            for (int64_t i = d_bias->stride_q ? row : 0; i < fa_min(seq.len_q, d_bias->stride_q ? row + 1 : seq.len_q);
                 ++i) {
                const real *ds = plan->ds + ((b * args->heads_q + h) * args->seqlen_q + i) * plan->ld;
                for (int64_t j = 0; j < seq.len_k; ++j) sum[d_bias->stride_k ? j : 0] += (double)ds[j];
            }
    }
    for (int64_t j = 0; j < (d_bias->stride_k ? args->seqlen_k : 1); ++j)
        fa_store(d_bias->data, d_bias->dtype,
                 batch * d_bias->stride_b + head * d_bias->stride_h + row * d_bias->stride_q + j * d_bias->stride_k,
                 sum[j]);
}

static size_t naive_backward_workspace_bytes(const fa_backward_args *args) {
    return naive_plan_of(&args->forward, args).workspace_bytes;
}

static void naive_backward_run(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    naive_plan plan = naive_plan_of(forward, args);
    const int64_t heads = forward->batch * forward->heads_q, blocks = heads * plan.row_blocks;
    const int64_t key_blocks = fa_ceil_div(forward->seqlen_k, kNaiveRows);
    memset(plan.slope_sums, 0, (size_t)(heads * forward->seqlen_q) * sizeof(double));
    memset(plan.sink_sums, 0, (size_t)(heads * forward->seqlen_q) * sizeof(double));
    fa_parallel_for(&forward->workers, forward->batch * forward->heads_kv, naive_pack_k_task, &plan);
    fa_parallel_for(&forward->workers, heads, naive_pack_q_task, &plan);
    fa_parallel_for(&forward->workers, blocks, naive_scores_task, &plan);
    fa_parallel_for(&forward->workers, blocks, naive_ds_task, &plan);
    if (args->d_bias.data) {
        const int64_t batches = args->d_bias.stride_b ? forward->batch : 1;
        const int64_t bias_heads = args->d_bias.stride_h ? forward->heads_q : 1;
        const int64_t rows = args->d_bias.stride_q ? forward->seqlen_q : 1;
        fa_parallel_for(&forward->workers, batches * bias_heads * rows, naive_bias_task, &plan);
    }
    fa_parallel_for(&forward->workers, blocks, naive_d_q_task, &plan);
    fa_parallel_for(&forward->workers, forward->batch * forward->heads_kv * key_blocks, naive_d_kv_task, &plan);
    store_per_head(forward, &args->d_alibi_slopes, plan.slope_sums, forward->seqlen_q);
    store_per_head(forward, &args->d_sinks, plan.sink_sums, forward->seqlen_q);
}
