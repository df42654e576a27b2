/* y = norm(act(bias + sum_lag taps[W-1-lag] x_{t-lag})), forward and backward, one segment of a document at a time.
 *
 * A ring of W rows holds the last inputs in fp32, so that every input is read and converted once and the state stands
 * before a document's first token like any other. The backward walks forward too: a second ring holds the gradients da
 * of the last W sums, and dx at a position is ready W - 1 tokens later. Positions before the first token are the
 * state's, so dstate falls out of the same loop. */
#include "kernel.h"
#include "matrix.h"

enum { MOST_TAPS = 8 };

typedef struct {
    float *taps;   /* [W, D], by lag */
    float *bias;   /* [D] */
    float *inputs; /* ring [W, D] */
    float *das;    /* ring [W, D] */
    float *a, *s, *z, *dz; /* [D] sums, their sigmoids, what is activated, its gradient */
    long D, row;           /* channels, and the floats of a row */
} Rooms;

static float *take(float **next, long floats) {
    float *taken = *next;
    *next += floats;
    return taken;
}

static void carve(Rooms *r, const ConvCall *c, float *memory) {
    r->D = c->channels, r->row = whole(c->channels);
    r->taps = take(&memory, c->taps * r->row);
    r->inputs = take(&memory, c->taps * r->row);
    r->das = take(&memory, c->taps * r->row);
    r->bias = take(&memory, r->row);
    r->a = take(&memory, r->row);
    r->s = take(&memory, r->row);
    r->z = take(&memory, r->row);
    r->dz = take(&memory, r->row);
}

size_t NAME(conv_floats)(const ConvCall *c) { return (3 * c->taps + 5) * whole(c->channels); }

static void read_weights(const Rooms *r, const ConvCall *c) {
    memset(r->taps, 0, c->taps * r->row * sizeof(float));
    memset(r->bias, 0, r->row * sizeof(float));
    for (long d = 0; d < r->D; d++)
        for (long lag = 0; lag < c->taps; lag++) r->taps[lag * r->row + d] = c->weight[d * c->taps + c->taps - 1 - lag];
    if (c->bias) memcpy(r->bias, c->bias, r->D * sizeof(float));
}

/* a ring's row for a position of a document; the first position is 1 - W */
INLINE float *slot(float *ring, const Rooms *r, long taps, long position) {
    return ring + (position + taps) % taps * r->row;
}

static void fetch(const Rooms *r, const ConvCall *c, const Segment *s, long position) {
    float *out = slot(r->inputs, r, c->taps, position);
    if (position >= 0) {
        const char *in = row_at(&c->x, s->start + position);
        EACH_VEC(at, count, r->D, store(out + at, get(in, c->x.dtype, at, count)););
        return;
    }
    memset(out, 0, r->row * sizeof(float));
    if (!c->state) return;
    long past = c->taps - 1;
    const float *in = c->state + s->document * r->D * past + past + position;
    for (long d = 0; d < r->D; d++) out[d] = in[d * past];
}

/* out = the sums of `token`, whose input and those before it are in the ring */
INLINE void sum_taps(float *out, const Rooms *r, long token, long taps) {
    const float *in[MOST_TAPS] = {0};
    for (long lag = 0; lag < taps; lag++) in[lag] = slot(r->inputs, r, taps, token - lag);
    for (long at = 0; at < r->row; at += LANES) {
        vec sum = load(r->bias + at);
        for (long lag = 0; lag < taps; lag++) sum += load(r->taps + lag * r->row + at) * load(in[lag] + at);
        store(out + at, sum);
    }
}

/* 1 / sqrt(sum z^2 + eps) of a head */
INLINE float inverse_norm(const float *z, long n, float eps) {
    vec squares = splat(0.0f);
    EACH_VEC(at, count, n, {
        vec v = get_floats(z + at, count);
        squares += v * v;
    });
    return 1.0f / __builtin_sqrtf(sum_lanes(squares) + eps);
}

static void activate(const Rooms *r, const ConvCall *c) {
    for (long at = 0; at < r->row; at += LANES) {
        vec a = load(r->a + at);
        store(r->z + at, c->silu ? a * sigmoid_vec(a) : a);
    }
    for (long first = 0; first < c->unit_channels; first += c->head_dim) {
        float *z = r->z + first, inverse = inverse_norm(z, c->head_dim, c->eps);
        EACH_VEC(at, count, c->head_dim, put_floats(z + at, count, get_floats(z + at, count) * inverse););
    }
}

/* da of one token from its sums a and dy: y = z i with i = (z.z + eps)^-1/2, so dz = i (dy - y (dy.y)) */
static void activate_backward(const Rooms *r, const ConvCall *c, const char *dy, float *da) {
    for (long at = 0; at < r->row; at += LANES) {
        vec a = load(r->a + at), s = sigmoid_vec(a);
        store(r->s + at, s);
        store(r->z + at, c->silu ? a * s : a);
    }
    EACH_VEC(at, count, r->D, store(r->dz + at, get(dy, c->dy.dtype, at, count)););
    for (long first = 0; first < c->unit_channels; first += c->head_dim) {
        float *z = r->z + first, *dz = r->dz + first, inverse = inverse_norm(z, c->head_dim, c->eps);
        vec dots = splat(0.0f);
        EACH_VEC(at, count, c->head_dim, dots += get_floats(z + at, count) * get_floats(dz + at, count););
        float dot = sum_lanes(dots) * inverse * inverse;
        EACH_VEC(at, count, c->head_dim, {
            vec d = get_floats(dz + at, count) - get_floats(z + at, count) * dot;
            put_floats(dz + at, count, d * inverse);
        });
    }
    for (long at = 0; at < r->row; at += LANES) {
        vec a = load(r->a + at), d = load(r->dz + at), s = load(r->s + at);
        store(da + at, c->silu ? d * s * (1.0f + a * (1.0f - s)) : d);
    }
}

static void keep_final(const Rooms *r, const ConvCall *c, const Segment *s) {
    long past = c->taps - 1;
    float *out = c->final + s->document * r->D * past;
    for (long i = 0; i < past; i++) {
        const float *in = slot(r->inputs, r, c->taps, s->length - past + i);
        for (long d = 0; d < r->D; d++) out[d * past + i] = in[d];
    }
}

INLINE void forward_segment(const Rooms *r, const ConvCall *c, const Segment *s, long taps) {
    for (long t = s->from - taps + 1; t < s->from; t++) fetch(r, c, s, t);
    for (long t = s->from; t < s->to; t++) {
        fetch(r, c, s, t);
        sum_taps(r->a, r, t, taps);
        activate(r, c);
        char *y = row_at(&c->y, s->start + t);
        EACH_VEC(at, count, r->D, put(y, c->y.dtype, at, count, load(r->z + at)););
    }
    if (s->to == s->length) keep_final(r, c, s);
}

void NAME(conv)(const ConvCall *c, const Segment *s, float *memory) {
    Rooms r;
    carve(&r, c, memory);
    read_weights(&r, c);
    if (c->taps == 4) forward_segment(&r, c, s, 4);
    else forward_segment(&r, c, s, c->taps);
}

/* sums[lag] += da x_{t-lag}, sums[W] += da */
INLINE void add_tap_gradients(float *sums, const Rooms *r, long token, long taps) {
    const float *da = slot(r->das, r, taps, token), *in[MOST_TAPS] = {0};
    for (long lag = 0; lag < taps; lag++) in[lag] = slot(r->inputs, r, taps, token - lag);
    for (long at = 0; at < r->row; at += LANES) {
        vec d = load(da + at);
        for (long lag = 0; lag < taps; lag++) {
            float *sum = sums + lag * r->row + at;
            store(sum, load(sum) + d * load(in[lag] + at));
        }
        float *sum = sums + taps * r->row + at;
        store(sum, load(sum) + d);
    }
}

/* the gradient of the input at `position`, from the das of it and the W - 1 tokens after it */
INLINE void write_dx(const Rooms *r, const ConvCall *c, const Segment *s, long position, long taps) {
    long past = taps - 1, in_final = position - (s->length - past);
    const float *das[MOST_TAPS] = {0};
    const float *dfinal = c->dfinal && in_final >= 0 ? c->dfinal + s->document * r->D * past + in_final : NULL;
    for (long lag = 0; lag < taps; lag++) das[lag] = slot(r->das, r, taps, position + lag);
    if (position < 0 && !c->dstate) return;
    char *out = position < 0 ? (char *)r->dz : row_at(&c->dx, s->start + position);
    EACH_VEC(at, count, r->D, {
        vec sum = splat(0.0f);
        for (long lag = 0; lag < taps; lag++) sum += load(r->taps + lag * r->row + at) * load(das[lag] + at);
        if (dfinal) {
            float part[LANES] = {0};
            for (long i = 0; i < count; i++) part[i] = dfinal[(at + i) * past];
            sum += load(part);
        }
        put(out, position < 0 ? FLOAT32 : c->dx.dtype, at, count, sum);
    });
    if (position >= 0) return;
    float *dstate = c->dstate + s->document * r->D * past + past + position;
    for (long d = 0; d < r->D; d++) dstate[d * past] = r->dz[d];
}

INLINE void backward_segment(const Rooms *r, const ConvCall *c, const Segment *s, float *sums, long taps) {
    long past = taps - 1, first = s->from ? s->from : -past;
    memset(r->das, 0, taps * r->row * sizeof(float));
    for (long t = s->from - past; t < s->from; t++) fetch(r, c, s, t);
    for (long t = s->from; t < s->to + past; t++) {
        float *da = slot(r->das, r, taps, t);
        if (t < s->length) {
            fetch(r, c, s, t);
            sum_taps(r->a, r, t, taps);
            activate_backward(r, c, row_at(&c->dy, s->start + t), da);
            if (t < s->to) add_tap_gradients(sums, r, t, taps);
        } else {
            memset(da, 0, r->row * sizeof(float));
        }
        if (t - past >= first) write_dx(r, c, s, t - past, taps);
    }
}

void NAME(conv_backward)(const ConvCall *c, const Segment *s, float *sums, float *memory) {
    Rooms r;
    carve(&r, c, memory);
    read_weights(&r, c);
    if (c->taps == 4) backward_segment(&r, c, s, sums, 4);
    else backward_segment(&r, c, s, sums, c->taps);
}
