/* Maps of one channel to one channel: SwiGLU's product and the log decays. */
#include "kernel.h"
#include "matrix.h"

/* y = silu(gate) * up. Matrices: gate, up; y, or dy, dgate, dup. */
void NAME(swiglu)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)sums, (void)memory;
    const Matrix *gate = &c->m[0], *up = &c->m[1], *y = &c->m[2];
    for (long row = from; row < to; row++) {
        const char *g = row_at(gate, row), *u = row_at(up, row);
        char *out = row_at(y, row);
        EACH_VEC(at, count, c->width, {
            vec z = get(g, gate->dtype, at, count);
            put(out, y->dtype, at, count, z * sigmoid_vec(z) * get(u, up->dtype, at, count));
        });
    }
}

void NAME(swiglu_backward)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)sums, (void)memory;
    const Matrix *gate = &c->m[0], *up = &c->m[1], *dy = &c->m[2], *dgate = &c->m[3], *dup = &c->m[4];
    for (long row = from; row < to; row++) {
        const char *g = row_at(gate, row), *u = row_at(up, row), *d = row_at(dy, row);
        char *out_gate = row_at(dgate, row), *out_up = row_at(dup, row);
        EACH_VEC(at, count, c->width, {
            vec z = get(g, gate->dtype, at, count), s = sigmoid_vec(z), dz = get(d, dy->dtype, at, count);
            put(out_up, dup->dtype, at, count, dz * z * s);
            vec slope = s * (1.0f + z * (1.0f - s));
            put(out_gate, dgate->dtype, at, count, dz * get(u, up->dtype, at, count) * slope);
        });
    }
}

/* kind 0: g = -rate softplus(z + bias)      1: g = rate logsigmoid(z + bias)
 * Matrices: z, rate [1, width] fp32, bias [1, width] fp32; g, or dg, dz. The sums are drate and dbias. */
enum { SOFTPLUS, LOGSIGMOID };

void NAME(log_decay)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)sums, (void)memory;
    const Matrix *z = &c->m[0], *g = &c->m[3];
    const float *rate = (const float *)c->m[1].data, *bias = (const float *)c->m[2].data;
    for (long row = from; row < to; row++) {
        const char *in = row_at(z, row);
        char *out = row_at(g, row);
        EACH_VEC(at, count, c->width, {
            vec u = get(in, z->dtype, at, count) + get_floats(bias + at, count);
            vec rates = get_floats(rate + at, count);
            put(out, g->dtype, at, count, -rates * softplus_vec(c->kind == SOFTPLUS ? u : -u));
        });
    }
}

void NAME(log_decay_backward)(const RowCall *c, long from, long to, float *sums, float *memory) {
    (void)memory;
    const Matrix *z = &c->m[0], *dg = &c->m[3], *dz = &c->m[4];
    const float *rate = (const float *)c->m[1].data, *bias = (const float *)c->m[2].data;
    float *drate = sums, *dbias = sums + c->width;
    for (long row = from; row < to; row++) {
        const char *in = row_at(z, row), *up = row_at(dg, row);
        char *out = row_at(dz, row);
        EACH_VEC(at, count, c->width, {
            vec u = get(in, z->dtype, at, count) + get_floats(bias + at, count);
            float sign = c->kind == SOFTPLUS ? 1.0f : -1.0f;
            u *= sign;
            vec d = get(up, dg->dtype, at, count);
            vec du = -sign * d * get_floats(rate + at, count) * sigmoid_vec(u);
            add_to(drate + at, count, -d * softplus_vec(u));
            add_to(dbias + at, count, du);
            put(out, dz->dtype, at, count, du);
        });
    }
}
