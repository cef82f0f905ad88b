// The GPU as the bench and the C tests see it: memory, copies, time. What the GPU refuses ends the process with a sentence:
// after one failure nothing on it can be trusted.
#ifndef FA_GPU_H
#define FA_GPU_H

#include <stddef.h>

const char *gpu_missing(void); // what kernels on a GPU lack here, in one sentence; NULL: nothing
const char *gpu_name(void);

void *gpu_allocate(size_t bytes); // NULL: there is not that much
void gpu_release(void *memory);
void gpu_fill(void *memory, int byte, size_t bytes);
void gpu_copy(void *to, const void *from,
              size_t bytes); // between host and GPU, either way, after all that was launched

// Milliseconds between the first and the last thing that call(context) launches on the default stream, none of its data
// in the L2 cache before.
double gpu_time_ms(void (*call)(const void *context), const void *context);

#endif
