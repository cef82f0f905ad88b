// The kernels of this build, and the choice among them.
#include "kernel_table.h"

#include <stdarg.h>
#include <stdio.h>

#include "error.h"

static const char *const kDeviceNames[] = {"cpu", "cuda"};

static const fa_kernel_rows *const kTable[] = {
#ifdef FA_WITH_CUDA
    &fa_cuda_kernel_rows,
#endif
    &fa_cpu_kernel_rows,
};
enum { kTableCount = sizeof kTable / sizeof kTable[0] };

int32_t fa_kernel_count(void) {
    int32_t count = 0;
    for (int t = 0; t < kTableCount; ++t) count += kTable[t]->count;
    return count;
}

static const fa_kernel *kernel_at(int32_t index) {
    for (int t = 0; t < kTableCount && index >= 0; index -= kTable[t++]->count)
        if (index < kTable[t]->count) return &kTable[t]->rows[index];
    return NULL;
}

fa_status fa_kernel_describe(int32_t index, fa_kernel_info *info) {
    const fa_kernel *kernel = kernel_at(index);
    FA_REQUIRE(kernel, FA_ERROR_VALUE, "kernel %d: this build has %d", (int)index, (int)fa_kernel_count());
    *info = kernel->info;
    return FA_OK;
}

void fa_add_reason(fa_reasons *reasons, const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (reasons->used) reasons->used += (size_t)snprintf(reasons->text + reasons->used, 3, "; ");
    const int written = vsnprintf(reasons->text + reasons->used, sizeof reasons->text - reasons->used, format, values);
    va_end(values);
    reasons->used += (size_t)written;
    if (reasons->used > sizeof reasons->text - 3) reasons->used = sizeof reasons->text - 3; // room for one more "; "
}

static int refuses(const fa_kernel *kernel, const fa_request *request, fa_reasons *reasons) {
    *reasons = (fa_reasons){0};
    if (kernel->info.device != request->device)
        fa_add_reason(reasons, "runs on %s, the tensors are on %s", kDeviceNames[kernel->info.device],
                      kDeviceNames[request->device]);
    if (request->kvcache) {
        if (!kernel->kvcache) fa_add_reason(reasons, "has no attention over a cache");
        if (kernel->refuse_kvcache) kernel->refuse_kvcache(request->kvcache, reasons);
        return reasons->used > 0;
    }
    if (request->backward ? !kernel->backward : !kernel->forward)
        fa_add_reason(reasons, "has no %s", request->backward ? "backward" : "forward");
    if (kernel->refuse) kernel->refuse(request->forward, request->backward, reasons);
    return reasons->used > 0;
}

fa_status fa_choose(const fa_request *request, const fa_kernel **chosen) {
    fa_reasons reasons;
    const fa_kernel *kernel, *named = NULL;
    for (int32_t i = 0; (kernel = kernel_at(i)) != NULL; ++i) {
        if (request->impl != FA_AUTO && kernel->info.impl != request->impl) continue;
        if (!refuses(kernel, request, &reasons)) {
            *chosen = kernel;
            return FA_OK;
        }
        if (!named || kernel->info.device == request->device) named = kernel;
    }
    FA_REQUIRE(request->impl == FA_AUTO, FA_ERROR_UNSUPPORTED, "impl '%s' cannot serve this request: %s",
               fa_impl_name(request->impl),
               !named ? "this build has no such kernel" : (refuses(named, request, &reasons), reasons.text));
    return fa_fail(FA_ERROR_UNSUPPORTED, "no kernel of this build serves tensors on %s", kDeviceNames[request->device]);
}

fa_status fa_verdict(int32_t index, const fa_request *request, char *text, size_t size) {
    fa_kernel_info info;
    fa_reasons reasons;
    const fa_kernel *chosen = NULL;
    FA_CHECK(fa_kernel_describe(index, &info));
    const fa_kernel *kernel = kernel_at(index);
    if (refuses(kernel, request, &reasons)) {
        snprintf(text, size, "%s", reasons.text);
    } else if (fa_choose(request, &chosen) == FA_OK && chosen == kernel) {
        snprintf(text, size, "chosen");
    } else {
        snprintf(text, size, request->impl == FA_AUTO ? "slower" : "not the impl asked for");
    }
    return FA_OK;
}
