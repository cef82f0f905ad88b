// Threads that wait for each other: a part of a block at a named barrier, blocks by a word in global memory
// (PTX ISA, "barrier", "ld.relaxed", "red.release").
#ifndef FA_PTX_SYNC_CUH
#define FA_PTX_SYNC_CUH

#include <cstdint>

// Waits until `threads` threads (whole warps) have come to barrier `id`, 1 ... 15 (0 is that of __syncthreads).
__device__ __forceinline__ void barrier_wait(int id, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Comes to the barrier and goes on: only barrier_wait of others waits for what it did before. compute-sanitizer's racecheck
// does not follow it, and takes later accesses that __syncthreads separates for races: -DFA_RACECHECK makes it wait, too.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef FA_RACECHECK
    barrier_wait(id, threads);
#else
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
// What others made of *p. A reduction that depends on it comes after theirs: both are done in the L2 cache.
__device__ __forceinline__ int load_relaxed(const int *p) {
    int x;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
// *p = max(*p, x), after what this block's threads wrote before a barrier.
__device__ __forceinline__ void raise_release(int *p, int x) {
    asm volatile("red.release.gpu.global.max.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// *p += x, after what this warp wrote before __syncwarp.
__device__ __forceinline__ void add_release(int *p, int x) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Waits until others have made *p at least x by add_release, and can read what they wrote before.
__device__ __forceinline__ void wait_acquire(const int *p, int x) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(p) : "memory");
    } while (now < x);
}

// p[0..3] += x in the L2 cache; nobody waits for it. p: aligned to 16 bytes.
__device__ __forceinline__ void reduce_add_4(float *p, float x0, float x1, float x2, float x3) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x0), "f"(x1), "f"(x2),
                 "f"(x3)
                 : "memory");
#else
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(x0) : "memory");
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p + 1), "f"(x1) : "memory");
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p + 2), "f"(x2) : "memory");
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p + 3), "f"(x3) : "memory");
#endif
}

#endif
