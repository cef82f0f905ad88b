#include "error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char error_text[1024];

fa_status fa_fail(fa_status status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error_text, sizeof error_text, format, values);
    va_end(values);
    return status;
}

const char *fa_error_text(void) { return error_text; }
