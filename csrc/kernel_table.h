// A row of the kernel table: what a kernel is called, what it refuses, how it runs; and the choice of a row.
#ifndef FA_KERNEL_TABLE_H
#define FA_KERNEL_TABLE_H

#include "flash_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

// Reasons for refusing a request, joined by "; ".
typedef struct fa_reasons {
    char text[512];
    size_t used;
} fa_reasons;
void fa_add_reason(fa_reasons *reasons, const char *format, ...) __attribute__((format(printf, 2, 3)));

typedef struct fa_kernel {
    fa_kernel_info info;
    // Adds every reason for not serving the request. backward: NULL in the forward pass. NULL: serves every request.
    void (*refuse)(const fa_forward_args *args, const fa_backward_args *backward, fa_reasons *reasons);
    size_t (*forward_bytes)(const fa_forward_args *args);
    fa_status (*forward)(const fa_forward_args *args);
    size_t (*backward_bytes)(const fa_backward_args *args);
    fa_status (*backward)(const fa_backward_args *args);
    // Attention over a key/value cache; NULL: none.
    void (*refuse_kvcache)(const fa_kvcache_args *args, fa_reasons *reasons); // NULL: serves every request
    size_t (*kvcache_bytes)(const fa_kvcache_args *args);
    fa_status (*kvcache)(const fa_kvcache_args *args);
} fa_kernel;

// What is asked for: forward alone, or with backward, or kvcache alone.
typedef struct fa_request {
    fa_device device;
    fa_impl impl;
    const fa_forward_args *forward;
    const fa_backward_args *backward;
    const fa_kvcache_args *kvcache;
} fa_request;

// The kernel that serves the request: the named one, or for auto the first row that does not refuse.
fa_status fa_choose(const fa_request *request, const fa_kernel **chosen);
fa_status fa_verdict(int32_t index, const fa_request *request, char *text, size_t size);

// Rows of one device, fastest first; a build without that device has none.
typedef struct fa_kernel_rows {
    const fa_kernel *rows;
    int32_t count;
} fa_kernel_rows;
extern const fa_kernel_rows fa_cpu_kernel_rows;
#ifdef FA_WITH_CUDA
extern const fa_kernel_rows fa_cuda_kernel_rows;
#endif

#ifdef __cplusplus
}
#endif
#endif
