// Checks that attention and attention over a cache share.
#ifndef FA_GATE_H
#define FA_GATE_H

#include "error.h"
#include "kernel_table.h"

fa_status fa_check_target(fa_device device, fa_impl impl, fa_dtype dtype);
fa_status fa_check_size(const char *name, int64_t value, int64_t least, int64_t most);
fa_status fa_check_heads(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t head_dim, int64_t head_dim_v);
fa_status fa_check_scores(fa_dtype dtype, double softmax_scale, double softcap, int causal, int64_t window_left,
                          int64_t window_right);
// own_dtype: whether the inputs' dtype will do, besides float32 (and float64 with float64 inputs).
fa_status fa_check_companion(const char *name, fa_dtype dtype, fa_dtype inputs, int own_dtype);
fa_status fa_check_per_head(const fa_per_head *alibi_slopes, const fa_per_head *sinks, fa_dtype inputs);
fa_status fa_check_tensor(const char *name, const fa_tensor *t, int64_t rows);
fa_status fa_check_workspace(const void *workspace, size_t bytes, size_t needed_bytes);

#endif
