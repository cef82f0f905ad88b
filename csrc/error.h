// The thread-local sentence behind a status.
#ifndef FA_ERROR_H
#define FA_ERROR_H

#include "flash_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

// Stores the sentence (printf's format) and returns status.
fa_status fa_fail(fa_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif

#define FA_REQUIRE(condition, ...)                                                                                     \
    do {                                                                                                               \
        if (!(condition)) return fa_fail(__VA_ARGS__);                                                                 \
    } while (0)
#define FA_CHECK(call)                                                                                                 \
    do {                                                                                                               \
        const fa_status status_ = (call);                                                                              \
        if (status_ != FA_OK) return status_;                                                                          \
    } while (0)

#endif
