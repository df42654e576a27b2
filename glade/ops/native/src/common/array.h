/* A tensor as Python hands it over: an address and strides, nothing of torch's. */
#ifndef GLADE_ARRAY_H
#define GLADE_ARRAY_H

#include <stddef.h>
#include <stdint.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* [batch, token, head, channel]; strides count elements. `width` is 1 for one number a head, else the number of
 * channels; the channel stride is 1, or 0 for a broadcast. Absent: data is NULL. */
typedef struct {
    char *data;
    int64_t dtype, width, batch, token, head, channel;
} Array;

#endif
