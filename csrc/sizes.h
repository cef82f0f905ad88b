// Whole-number arithmetic, and how a workspace is cut into pieces.
#ifndef FA_SIZES_H
#define FA_SIZES_H

#include "flash_attention.h"
#include "host_device.h"

static FA_HOST_DEVICE int64_t fa_min(int64_t a, int64_t b) { return a < b ? a : b; }
static FA_HOST_DEVICE int64_t fa_max(int64_t a, int64_t b) { return a > b ? a : b; }
static FA_HOST_DEVICE int64_t fa_clamp(int64_t x, int64_t least, int64_t most) {
    return fa_min(fa_max(x, least), most);
}
static FA_HOST_DEVICE int64_t fa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static FA_HOST_DEVICE int64_t fa_round_up(int64_t a, int64_t b) { return fa_ceil_div(a, b) * b; }

static FA_HOST_DEVICE int64_t fa_dtype_bytes(fa_dtype dtype) {
    return dtype == FA_FLOAT64 ? 8 : dtype == FA_FLOAT32 ? 4 : dtype == FA_FLOAT8_E4M3 ? 1 : 2;
}
static FA_HOST_DEVICE fa_dtype fa_lse_dtype(const fa_forward_args *args) {
    return args->dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32;
}

// Tasks are counted part by part within a head, head by head within a sequence.
typedef struct fa_place {
    int64_t part, head, b;
} fa_place;
static FA_HOST_DEVICE fa_place fa_place_of(int64_t task, int64_t heads, int64_t parts) {
    const fa_place place = {task % parts, task / parts % heads, task / parts / heads};
    return place;
}

// Hands out aligned pieces of a workspace; with base NULL it only counts.
typedef struct fa_arena {
    char *base;
    size_t used_bytes;
} fa_arena;
static inline void *fa_take(fa_arena *arena, size_t bytes) {
    char *piece = arena->base ? arena->base + arena->used_bytes : NULL;
    arena->used_bytes += (bytes + FA_WORKSPACE_ALIGNMENT - 1) / FA_WORKSPACE_ALIGNMENT * FA_WORKSPACE_ALIGNMENT;
    return piece;
}

#endif
