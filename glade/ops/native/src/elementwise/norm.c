/* RMSNorm of each head of a row, its weight, and an optional gate:
 *
 *     y = weight * x / sqrt(mean x^2 + eps) * act(gate)        act: silu or sigmoid
 *
 * Matrices: x, weight [1, head] fp32, gate or absent; y (forward); dy, dx, dgate (backward). The sum is the weight's
 * gradient: by channel of the row, the caller adds up its heads. A row is `heads` heads of width / heads channels. */
#include "kernel.h"
#include "matrix.h"

enum { X, WEIGHT, GATE, Y, DY, DX, DGATE };
enum { SILU = 1, SIGMOID = 2 };

INLINE float inverse_rms(const char *x, int64_t dtype, long n, float eps) {
    vec squares = splat(0.0f);
    EACH_VEC(at, count, n, {
        vec v = get(x, dtype, at, count);
        squares += v * v;
    });
    return 1.0f / __builtin_sqrtf(sum_lanes(squares) / n + eps);
}

INLINE char *head_of(const Matrix *x, long row, long channel) {
    return row_at(x, row) + channel * (x->dtype == FLOAT32 ? 4 : 2);
}

INLINE void forward(const RowCall *c, long from, long to, int kind) {
    const Matrix *x = &c->m[X], *gate = &c->m[GATE], *y = &c->m[Y];
    const float *weight = (const float *)c->m[WEIGHT].data;
    long n = c->width / c->heads;
    for (long row = from; row < to; row++)
        for (long first = 0; first < c->width; first += n) {
            const char *in = head_of(x, row, first), *g = kind ? head_of(gate, row, first) : NULL;
            char *out = head_of(y, row, first);
            float r = inverse_rms(in, x->dtype, n, c->eps);
            EACH_VEC(at, count, n, {
                vec value = get(in, x->dtype, at, count) * r * get_floats(weight + at, count);
                if (kind) {
                    vec z = get(g, gate->dtype, at, count), s = sigmoid_vec(z);
                    value *= kind == SILU ? z * s : s;
                }
                put(out, y->dtype, at, count, value);
            });
        }
}

void NAME(rms_norm)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)sums, (void)memory;
    if (!c->m[GATE].data) forward(c, from, to, 0);
    else if (c->kind == SILU) forward(c, from, to, SILU);
    else forward(c, from, to, SIGMOID);
}

/* With u = x r and a = act(gate): dgate = dy weight u act', dweight = dy a u, and from du = dy a weight
 * dx = r (du - u mean(du u)); du waits in `waiting`. */
INLINE void backward(const RowCall *c, long from, long to, float *sums, float *waiting, int kind) {
    const Matrix *x = &c->m[X], *gate = &c->m[GATE], *dy = &c->m[DY], *dx = &c->m[DX], *dgate = &c->m[DGATE];
    const float *weight = (const float *)c->m[WEIGHT].data;
    long n = c->width / c->heads;
    for (long row = from; row < to; row++)
        for (long first = 0; first < c->width; first += n) {
            const char *in = head_of(x, row, first), *up = head_of(dy, row, first);
            const char *g = kind ? head_of(gate, row, first) : NULL;
            char *out = head_of(dx, row, first), *out_gate = kind ? head_of(dgate, row, first) : NULL;
            float r = inverse_rms(in, x->dtype, n, c->eps);
            vec dot = splat(0.0f);
            EACH_VEC(at, count, n, {
                vec u = get(in, x->dtype, at, count) * r, w = get_floats(weight + at, count);
                vec d = get(up, dy->dtype, at, count);
                if (kind) {
                    vec z = get(g, gate->dtype, at, count), s = sigmoid_vec(z);
                    vec slope = kind == SILU ? s * (1.0f + z * (1.0f - s)) : s * (1.0f - s);
                    put(out_gate, dgate->dtype, at, count, d * w * u * slope);
                    d *= kind == SILU ? z * s : s;
                }
                add_to(sums + first + at, count, d * u);
                d *= w;
                dot += d * u;
                store(waiting + at, d);
            });
            float mean = sum_lanes(dot) / n;
            EACH_VEC(at, count, n, {
                vec u = get(in, x->dtype, at, count) * r;
                put(out, dx->dtype, at, count, r * (load(waiting + at) - u * mean));
            });
        }
}

void NAME(rms_norm_backward)(const RowCall *c, long from, long to, float *sums, float *memory) {
    if (!c->m[GATE].data) backward(c, from, to, sums, memory, 0);
    else if (c->kind == SILU) backward(c, from, to, sums, memory, SILU);
    else backward(c, from, to, sums, memory, SIGMOID);
}
