// Memory whose surroundings are watched.
#ifndef FA_TEST_GUARDED_H
#define FA_TEST_GUARDED_H

#include <stdbool.h>
#include <stddef.h>

// On the CPU, memory ends (FLUSH_END) or begins (FLUSH_START) at an inaccessible page, with one at its other end too. On the
// GPU, which has no such pages, its twin stands between two zones of a pattern, which nobody may change; under
// compute-sanitizer it is an allocation of its own.
typedef enum placement {
    FLUSH_START,
    FLUSH_END,
    GPU_ALIGNED,   // the twin is aligned as cudaMalloc does
    GPU_VECTORS,   // the twin is aligned to 16 bytes, or as asked for, no better
    GPU_UNALIGNED, // the twin is aligned as asked for, no better
} placement;
static inline bool on_gpu(placement where) { return where >= GPU_ALIGNED; }

// For the test to read and write; every byte 0xFF, which is NaN in every dtype. alignment: a power of two.
void *guarded(size_t bytes, size_t alignment, placement where);
// For the kernel alone: 0xFF too, but not written at all under compute-sanitizer, which then sees who reads it first.
void *guarded_scratch(size_t bytes, size_t alignment, placement where);
void *guarded_for_kernel(const void *data); // the twin of what guarded() returned, if it has one
void guarded_protect(const void *data, bool writable);

void guarded_to_gpu(void);   // copies to every twin
void guarded_from_gpu(void); // and back; expects protected twins and all zones to be unchanged
void guarded_leave_gpu(void);
void guarded_release_all(void); // expects the bytes around each block to be 0xFF still

#endif
