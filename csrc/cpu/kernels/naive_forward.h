// The naive forward pass: scores, softmax, o, each over the whole matrix. Included by naive.h.

// Step 2: softmax of each row, in place, and its lse; then dropout.
static void naive_softmax_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const naive_block block = naive_block_of(plan, task, worker);
    if (block.rows <= 0) return;
    const real *keep = naive_keep(plan, &block);
    const real sink = sink_of(args, block.h);
    for (int64_t r = 0; r < block.rows; ++r) {
        real *p = plan->p + block.matrix + r * plan->ld;
        real max = sink, sum = 0;
        for (int64_t j = 0; j < plan->ld; ++j) max = p[j] > max ? p[j] : max;
        if (max == -INFINITY) max = 0; // no key: every term is 0
        for (int64_t j = 0; j < plan->ld; ++j) {
            p[j] = real_exp(p[j] - max);
            sum += p[j];
        }
        sum += real_exp(sink - max);
        const real inverse = sum == 0 ? 0 : 1 / sum;
        for (int64_t j = 0; j < plan->ld; ++j) p[j] *= keep ? inverse * keep[r * plan->ld + j] : inverse;
        const fa_sequence *seq = &block.rule.seq;
        const int64_t lse_at = fa_row_offset(&args->lse, seq->batch_index, block.h, seq->row_q + block.row0 + r);
        ((real *)args->lse.data)[lse_at] = sum == 0 ? -INFINITY : max + real_log(sum);
    }
}

// Step 3: o = p v.
static void naive_output_task(void *arg, int64_t task, int32_t worker) {
    const naive_plan *plan = arg;
    const fa_forward_args *args = plan->args;
    const naive_block block = naive_block_of(plan, task, worker);
    if (block.rows <= 0) return;
    const fa_sequence *seq = &block.rule.seq;
    naive_product(block.rows, plan->dv_stride, seq->len_k, plan->p + block.matrix, plan->ld, 1,
                  packed_at(&plan->v, block.h_kv, block.k_row), plan->dv_stride, block.scratch, plan->dv_stride, 0);
    for (int64_t r = 0; r < block.rows; ++r) {
        store_tensor_row(&args->o, args->dtype, seq->batch_index, block.h, seq->row_q + block.row0 + r,
                         block.scratch + r * plan->dv_stride, args->head_dim_v, 1);
    }
}

static size_t naive_forward_workspace_bytes(const fa_forward_args *args) {
    return naive_plan_of(args, NULL).workspace_bytes;
}

static void naive_forward_run(const fa_forward_args *args) {
    naive_plan plan = naive_plan_of(args, NULL);
    const int64_t blocks = args->batch * args->heads_q * plan.row_blocks;
    fa_parallel_for(&args->workers, args->batch * args->heads_kv, naive_pack_k_task, &plan);
    fa_parallel_for(&args->workers, args->batch * args->heads_q, naive_pack_q_task, &plan);
    fa_parallel_for(&args->workers, blocks, naive_scores_task, &plan);
    fa_parallel_for(&args->workers, blocks, naive_softmax_task, &plan);
    fa_parallel_for(&args->workers, blocks, naive_output_task, &plan);
}
