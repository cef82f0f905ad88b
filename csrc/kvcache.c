// The gate of attention over a key/value cache.
#include "gate.h"
#include "sizes.h"

static fa_status check_rotary(const fa_kvcache_args *args) {
    const fa_rotary *rotary = &args->rotary;
    if (!rotary->cos && !rotary->sin) return FA_OK;
    FA_REQUIRE(rotary->cos && rotary->sin, FA_ERROR_VALUE, "rotary_cos and rotary_sin: give both or neither");
    FA_REQUIRE(args->k.data, FA_ERROR_VALUE, "rotary_cos, rotary_sin: need k, whose rotation they are");
    FA_CHECK(fa_check_companion("rotary_cos", rotary->dtype, args->dtype, 1));
    FA_REQUIRE(rotary->dim % 2 == 0 && rotary->dim >= 2 && rotary->dim <= args->head_dim, FA_ERROR_VALUE,
               "rotary_dim %lld: must be even and between 2 and head_dim %lld", (long long)rotary->dim,
               (long long)args->head_dim);
    FA_REQUIRE(rotary->interleaved == 0 || rotary->interleaved == 1, FA_ERROR_VALUE,
               "rotary_interleaved %d: must be 0 or 1", (int)rotary->interleaved);
    // Every token that a cache may hold has a position.
    FA_CHECK(fa_check_size("rotary_cos, rotary_sin: positions", rotary->positions, 1, INT32_MAX));
    FA_REQUIRE(rotary->positions >= args->max_pages * args->page_size, FA_ERROR_VALUE,
               "rotary_cos has %lld positions: the cache holds %lld tokens a sequence", (long long)rotary->positions,
               (long long)(args->max_pages * args->page_size));
    return FA_OK;
}

static fa_status check_descale(const char *name, const fa_per_head *t, int is_float8) {
    FA_REQUIRE(!t->data || is_float8, FA_ERROR_VALUE, "%s: is for float8_e4m3fn caches", name);
    FA_REQUIRE(!t->data || t->dtype == FA_FLOAT32, FA_ERROR_TYPE, "%s is %s: must be float32", name,
               fa_dtype_name(t->dtype));
    return FA_OK;
}

static fa_status check_request(const fa_kvcache_args *args) {
    FA_REQUIRE(args, FA_ERROR_VALUE, "args: is NULL");
    FA_CHECK(fa_check_target(args->device, args->impl, args->dtype));
    const int is_float8 = args->cache_dtype == FA_FLOAT8_E4M3;
    FA_REQUIRE(args->cache_dtype == args->dtype || (is_float8 && fa_dtype_bytes(args->dtype) == 2), FA_ERROR_TYPE,
               "k_cache is %s and q is %s: they must have one dtype, or a float16 or bfloat16 q a float8_e4m3fn cache",
               fa_dtype_name(args->cache_dtype), fa_dtype_name(args->dtype));
    FA_CHECK(fa_check_heads(args->batch, args->heads_q, args->heads_kv, args->head_dim, args->head_dim_v));
    FA_CHECK(fa_check_size("seqlen_q", args->seqlen_q, 0, INT32_MAX));
    FA_CHECK(fa_check_size("pages", args->pages, 0, INT32_MAX));
    FA_CHECK(fa_check_size("page_size", args->page_size, 0, INT32_MAX));
    FA_CHECK(fa_check_size("max_pages", args->max_pages, 0, INT32_MAX));
    FA_CHECK(fa_check_size("seqlen_q + max_pages x page_size", args->seqlen_q + args->max_pages * args->page_size, 0,
                           INT32_MAX - 1024)); // positions are counted in 32 bits, and a tile beyond
    FA_REQUIRE(args->page_table || (args->max_pages == 1 && args->pages >= args->batch), FA_ERROR_VALUE,
               "k_cache has %lld entries: without a page_table or cache_batch_idx each of %lld sequences needs its own",
               (long long)args->pages, (long long)args->batch);
    // No byte count of any workspace may overflow: rows of head_dim, for every query and 64 keys.
    FA_REQUIRE((double)args->heads_q * ((double)args->batch + 1) * ((double)args->seqlen_q + 64) *
                       ((double)args->max_pages * (double)args->page_size / 64 + FA_MAX_HEAD_DIM) <
                   0x1p50,
               FA_ERROR_VALUE, "batch %lld, heads_q %lld, seqlen_q %lld, %lld tokens: more than 2^50 partial rows",
               (long long)args->batch, (long long)args->heads_q, (long long)args->seqlen_q,
               (long long)(args->max_pages * args->page_size));
    FA_CHECK(fa_check_scores(args->dtype, args->softmax_scale, args->softcap, args->causal, args->window_left,
                             args->window_right));
    FA_CHECK(fa_check_per_head(&args->alibi_slopes, &args->sinks, args->dtype));
    FA_REQUIRE((args->k.data != NULL) == (args->v.data != NULL), FA_ERROR_VALUE, "k and v: give both or neither");
    FA_CHECK(check_rotary(args));
    FA_CHECK(check_descale("k_descale", &args->k_descale, is_float8));
    FA_CHECK(check_descale("v_descale", &args->v_descale, is_float8));
    FA_REQUIRE(args->num_splits >= 0 && args->num_splits <= 1024, FA_ERROR_VALUE,
               "num_splits %lld: must be between 1 and 1024, or 0 to choose", (long long)args->num_splits);
    return fa_check_size("workers.count", args->workers.count, 0, 1 << 16);
}

fa_status fa_kvcache_check(const fa_kvcache_args *args) {
    FA_CHECK(check_request(args));
    const int64_t capacity = args->max_pages * args->page_size, added = args->k.data ? args->seqlen_q : 0;
    FA_REQUIRE(args->cache_seqlens || args->batch == 0, FA_ERROR_VALUE, "cache_seqlens: is NULL");
    for (int64_t b = 0; b < args->batch; ++b) {
        const int64_t length = args->cache_seqlens[b];
        FA_REQUIRE(length >= 0 && length <= capacity, FA_ERROR_VALUE,
                   "cache_seqlens[%lld] = %lld: must be between 0 and the %lld tokens that the cache holds a sequence",
                   (long long)b, (long long)length, (long long)capacity);
        FA_REQUIRE(length + added <= capacity, FA_ERROR_VALUE,
                   "cache_seqlens[%lld] = %lld and %lld new tokens: the cache holds %lld tokens a sequence",
                   (long long)b, (long long)length, (long long)added, (long long)capacity);
        const int64_t used = args->page_size ? fa_ceil_div(length + added, args->page_size) : 0;
        for (int64_t i = 0; args->page_table && i < used; ++i) {
            const int64_t page = args->page_table[b * args->page_table_stride + i];
            FA_REQUIRE(page >= 0 && page < args->pages, FA_ERROR_VALUE,
                       "page_table (cache_batch_idx) of sequence %lld: page %lld is %lld, must be between 0 and %lld",
                       (long long)b, (long long)i, (long long)page, (long long)(args->pages - 1));
        }
    }
    return FA_OK;
}

// What is behind the pointers; lengths and pages are read where the host can.
static fa_status check_data(const fa_kvcache_args *args) {
    const int64_t q_rows = args->batch * args->heads_q * args->seqlen_q;
    const int64_t cache_rows = args->pages * args->heads_kv * args->page_size;
    FA_CHECK(fa_check_tensor("q", &args->q, q_rows));
    FA_CHECK(fa_check_tensor("o", &args->o, q_rows));
    FA_CHECK(fa_check_tensor("k_cache", &args->k_cache, cache_rows));
    FA_CHECK(fa_check_tensor("v_cache", &args->v_cache, cache_rows));
    FA_REQUIRE(args->cache_seqlens || args->batch == 0, FA_ERROR_VALUE, "cache_seqlens: is NULL");
    return args->device == FA_CPU ? fa_kvcache_check(args) : FA_OK;
}

static fa_status choose(const fa_kvcache_args *args, const fa_kernel **kernel) {
    const fa_request request = {args->device, args->impl, NULL, NULL, args};
    return fa_choose(&request, kernel);
}

fa_status fa_kvcache_verdict(int32_t index, const fa_kvcache_args *args, char *text, size_t size) {
    FA_CHECK(check_request(args));
    const fa_request request = {args->device, args->impl, NULL, NULL, args};
    return fa_verdict(index, &request, text, size);
}

fa_status fa_kvcache_workspace_bytes(const fa_kvcache_args *args, size_t *bytes) {
    const fa_kernel *kernel = NULL;
    FA_REQUIRE(bytes, FA_ERROR_VALUE, "bytes: is NULL");
    FA_CHECK(check_request(args));
    FA_CHECK(choose(args, &kernel));
    *bytes = kernel->kvcache_bytes(args);
    return FA_OK;
}

fa_status fa_kvcache_forward(const fa_kvcache_args *args) {
    const fa_kernel *kernel = NULL;
    FA_CHECK(check_request(args));
    FA_CHECK(check_data(args));
    FA_CHECK(choose(args, &kernel));
    FA_CHECK(fa_check_workspace(args->workspace, args->workspace_bytes, kernel->kvcache_bytes(args)));
    return kernel->kvcache(args);
}
