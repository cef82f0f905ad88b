#include "gpu.h"

#ifdef FA_WITH_CUDA
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

static void must(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "the GPU: %s\n", cudaGetErrorString(error));
    exit(2);
}

const char *gpu_missing(void) {
    static char text[160];
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return NULL;
    snprintf(text, sizeof text, "CUDA finds no GPU here (%s)", cudaGetErrorString(error));
    return text;
}

const char *gpu_name(void) {
    static struct cudaDeviceProp properties;
    int device;
    must(cudaGetDevice(&device));
    must(cudaGetDeviceProperties(&properties, device));
    return properties.name;
}

void *gpu_allocate(size_t bytes) {
    void *memory = NULL;
    const cudaError_t error = cudaMalloc(&memory, bytes);
    if (error != cudaErrorMemoryAllocation) must(error);
    cudaGetLastError(); // what is refused here must not stand in the next launch check
    return memory;
}

void gpu_release(void *memory) { must(cudaFree(memory)); }
void gpu_fill(void *memory, int byte, size_t bytes) { must(cudaMemset(memory, byte, bytes)); }
void gpu_copy(void *to, const void *from, size_t bytes) { must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }

static size_t l2_bytes(void) {
    int device, bytes;
    must(cudaGetDevice(&device));
    must(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
    return (size_t)bytes;
}

double gpu_time_ms(void (*call)(const void *context), const void *context) {
    static cudaEvent_t start, stop;
    static void *eviction;
    static size_t eviction_bytes;
    if (!eviction) {
        eviction_bytes = 2 * l2_bytes();
        must(cudaMalloc(&eviction, eviction_bytes));
        must(cudaEventCreate(&start));
        must(cudaEventCreate(&stop));
    }
    must(cudaMemsetAsync(eviction, 0, eviction_bytes, NULL)); // runs while call() is launching: that cost is not timed
    must(cudaEventRecord(start, NULL));
    call(context);
    must(cudaEventRecord(stop, NULL));
    must(cudaEventSynchronize(stop));
    float ms;
    must(cudaEventElapsedTime(&ms, start, stop));
    return (double)ms;
}

#else

const char *gpu_missing(void) {
    return "this build has no CUDA kernels: make builds them where it finds nvcc and a GPU, or with FA_CUDA=1";
}
const char *gpu_name(void) { return ""; }
void *gpu_allocate(size_t bytes) { return (void)bytes, NULL; }
void gpu_release(void *memory) { (void)memory; }
void gpu_fill(void *memory, int byte, size_t bytes) { (void)memory, (void)byte, (void)bytes; }
void gpu_copy(void *to, const void *from, size_t bytes) { (void)to, (void)from, (void)bytes; }
double gpu_time_ms(void (*call)(const void *context), const void *context) { return (void)call, (void)context, 0; }

#endif
