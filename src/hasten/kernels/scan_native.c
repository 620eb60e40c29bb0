/* The selective scan and its gradients in float32; scan_native.py compiles this file at first use.
 *
 *     h[s] = exp(dt A) h[s-1] + dt u B        y[s] = (sum_n C h[s] + D u) silu(z)        dt = softplus(delta + bias)
 *
 * s counts steps in scan order; step s stands at row t = s, or t = length - 1 - s in reverse. Shapes, all contiguous:
 *
 *     u, delta, z, y (batch, length, channels)    A (channels, states)    B, C (batch, length, groups, states)
 *     D, bias (channels)    last (batch, channels, states)    checkpoints (chunks, batch, channels, states)
 *
 * A vector holds LANES neighbouring channels, so that nothing is summed across its lanes but the gradients of B and C.
 * A task is one block of channels in one group of one sample. What several tasks add to, the gradients of A, B, C, D
 * and bias, is written as partial sums, so that no result depends on the number of threads or their timing.
 * CHUNK and BLOCK, the channels of a task, come from the command line.
 */
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define MAX(a, b) ((vec)_mm512_max_ps(a, b)) /* max and min give b where either is NaN */
#define MIN(a, b) ((vec)_mm512_min_ps(a, b))
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define MAX(a, b) ((vec)_mm256_max_ps(a, b))
#define MIN(a, b) ((vec)_mm256_min_ps(a, b))
#else
#define LANES 4
#define MAX(a, b) choose((a) > (b), a, b)
#define MIN(a, b) choose((a) < (b), a, b)
#endif
#define TILES (BLOCK / LANES) /* vectors of a task */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

typedef struct {
    int64_t batch, length, channels, states, groups;
    int32_t softplus, reverse;
    const float *u, *delta, *A, *B, *C, *D, *z, *bias; /* D, z and bias may be NULL */
} Scan;

/* ---- vectors of channels: the last one of a group may be partly filled, its other lanes are zero */

static inline vec splat(float x) { return (vec){0} + x; }

static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

static inline vec load(const float *from, int lanes) {
    vec x = {0};
    if (lanes == LANES) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, lanes * sizeof(float));
    return x;
}

static inline void store(float *to, vec x, int lanes) {
    if (lanes == LANES) memcpy(to, &x, sizeof x);
    else memcpy(to, &x, lanes * sizeof(float));
}

/* (channels, states) in memory <-> a vector for each state, `stride` vectors apart */
static inline void load_states(vec *to, int64_t stride, const float *from, int lanes, int64_t states) {
    for (int64_t n = 0; n < states; n++) {
        vec x = {0};
        for (int i = 0; i < lanes; i++) x[i] = from[i * states + n];
        to[n * stride] = x;
    }
}

static inline void store_states(float *to, const vec *from, int lanes, int64_t states) {
    for (int i = 0; i < lanes; i++)
        for (int64_t n = 0; n < states; n++) to[i * states + n] = from[n][i];
}

static inline float lane_sum(vec x) {
    float part[LANES];
    memcpy(part, &x, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* ---- elementary functions */

/* e^x = 2^k e^r with |r| <= log(2) / 2, to 1e-7; 0 below -87.7, inf above 88.4. NaN passes it all. */
static inline vec exponential(vec x) {
    const float shift = 12583039.0f; /* 1.5 * 2^23 + 127: k + 127 ends up in the lowest bits */
    x = MIN(splat(89.0f), MAX(splat(-88.0f), x));
    vec shifted = x * 1.44269504f + shift;
    vec k = shifted - shift;
    vec r = x - k * 0.693359375f; /* log(2) in two parts; the first product is exact */
    r = r + k * 2.12194440e-4f;
    vec p = r * 1.3814644e-3f + 8.3687175e-3f;
    p = p * r + 4.1668389e-2f;
    p = p * r + 1.6666521e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f; /* exact at r = 0: an error there would add up over the steps of slow channels */
    p = p * r + 1.0f;
    return p * (vec)((ivec)shifted << 23);
}

static inline vec sigmoid(vec x) {
    vec e = exponential(choose(x < 0, x, -x)); /* of -|x|: no overflow, no cancellation */
    return choose(x < 0, e, splat(1.0f)) / (1.0f + e);
}

/* max(x, 0) + log(1 + e), e = exp(-|x|); log(1 + e) = 2 artanh(e / (2 + e)) keeps the relative accuracy of small e */
static inline vec softplus(vec x) {
    vec e = exponential(choose(x < 0, x, -x));
    vec q = e / (2.0f + e), w = q * q;
    vec p = w * 1.2145153e-1f + 1.0715279e-1f;
    p = p * w + 1.4308307e-1f;
    p = p * w + 1.9999444e-1f;
    p = p * w + 3.3333337e-1f;
    return choose(x < 0, splat(0.0f), x) + 2.0f * (q + q * w * p);
}

/* ---- one task */

typedef struct {
    int64_t sample, group, block;
    int64_t channel, width; /* the first, and how many: BLOCK, or fewer at the end of a group */
} Task;

static int64_t blocks(const Scan *scan) { return (scan->channels / scan->groups + BLOCK - 1) / BLOCK; }

static Task nth_task(const Scan *scan, int64_t index) {
    const int64_t per_group = scan->channels / scan->groups;
    Task task;
    task.block = index % blocks(scan);
    task.group = index / blocks(scan) % scan->groups;
    task.sample = index / blocks(scan) / scan->groups;
    task.channel = task.group * per_group + task.block * BLOCK;
    task.width = per_group - task.block * BLOCK < BLOCK ? per_group - task.block * BLOCK : BLOCK;
    return task;
}

/* channels in the vector that begins `at` channels into the task */
static inline int filled(const Task *task, int64_t at) { return task->width - at < LANES ? task->width - at : LANES; }

/* row of step s in a tensor (batch * length, ...) */
static inline int64_t row(const Scan *scan, int64_t sample, int64_t s) {
    return sample * scan->length + (scan->reverse ? scan->length - 1 - s : s);
}

typedef struct { /* one vector of channels over the steps of one chunk */
    vec u[CHUNK], dt[CHUNK];
    vec raw[CHUNK];                   /* delta + bias */
    vec input[CHUNK];                 /* dt u */
    vec y[CHUNK];                     /* before the gate */
    const float *B[CHUNK], *C[CHUNK]; /* (states) each */
} Chunk;

/* all but y's part from the states, which the caller adds */
static inline void load_chunk(
    Chunk *chunk, const Scan *scan, const Task *task, int64_t first, int steps, int64_t channel, int lanes
) {
    const vec skip = scan->D ? load(scan->D + channel, lanes) : splat(0.0f);
    const vec bias = scan->bias ? load(scan->bias + channel, lanes) : splat(0.0f);
    for (int s = 0; s < steps; s++) {
        const int64_t r = row(scan, task->sample, first + s);
        chunk->u[s] = load(scan->u + r * scan->channels + channel, lanes);
        chunk->raw[s] = load(scan->delta + r * scan->channels + channel, lanes) + bias;
        chunk->dt[s] = scan->softplus ? softplus(chunk->raw[s]) : chunk->raw[s];
        chunk->input[s] = chunk->dt[s] * chunk->u[s];
        chunk->y[s] = skip * chunk->u[s];
        chunk->B[s] = scan->B + (r * scan->groups + task->group) * scan->states;
        chunk->C[s] = scan->C + (r * scan->groups + task->group) * scan->states;
    }
}

static void forward_task(const Scan *scan, Task task, vec *scratch, float *y, float *last, float *checkpoints) {
    const int64_t states = scan->states, channels = scan->channels;
    vec *A = scratch, *state = A + TILES * states;
    Chunk chunk;

    memset(state, 0, TILES * states * sizeof(vec));
    for (int64_t at = 0; at < task.width; at += LANES)
        load_states(A + at / LANES * states, 1, scan->A + (task.channel + at) * states, filled(&task, at), states);

    for (int64_t first = 0; first < scan->length; first += CHUNK) {
        const int steps = scan->length - first < CHUNK ? scan->length - first : CHUNK;
        float *checkpoint = checkpoints + (first / CHUNK * scan->batch + task.sample) * channels * states;
        for (int64_t at = 0; at < task.width; at += LANES) {
            const int64_t channel = task.channel + at, tile = at / LANES * states;
            const int lanes = filled(&task, at);
            store_states(checkpoint + channel * states, state + tile, lanes, states);
            load_chunk(&chunk, scan, &task, first, steps, channel, lanes);
            for (int64_t n = 0; n < states; n++) { /* steps innermost: a and h stay in registers */
                const vec a = A[tile + n];
                vec h = state[tile + n];
                for (int s = 0; s < steps; s++) {
                    h = exponential(chunk.dt[s] * a) * h + chunk.input[s] * chunk.B[s][n];
                    chunk.y[s] += h * chunk.C[s][n];
                }
                state[tile + n] = h;
            }
            for (int s = 0; s < steps; s++) {
                const int64_t offset = row(scan, task.sample, first + s) * channels + channel;
                const vec z = scan->z ? load(scan->z + offset, lanes) : splat(0.0f);
                store(y + offset, scan->z ? chunk.y[s] * z * sigmoid(z) : chunk.y[s], lanes);
            }
        }
    }

    for (int64_t at = 0; at < task.width; at += LANES) {
        const int64_t channel = task.sample * channels + task.channel + at;
        store_states(last + channel * states, state + at / LANES * states, filled(&task, at), states);
    }
}

typedef struct {
    const float *y, *last, *checkpoints; /* last may be NULL: zeros */
    float *u, *delta, *z;                /* as u; z is NULL where the scan has none */
    float *A, *D, *bias;                 /* (batch, channels, states), (batch, channels) twice: partial sums */
    float *B, *C;                        /* (blocks, batch, length, groups, states): partial sums */
} Gradients;

/* From the last chunk to the first; g[s] = C dy[s] + exp(dt[s+1] A) g[s+1] is the gradient of h[s]. */
static void backward_task(const Scan *scan, Task task, vec *scratch, const Gradients *grad) {
    const int64_t states = scan->states, channels = scan->channels, chunks = (scan->length + CHUNK - 1) / CHUNK;
    /* [tile][state]; carry: the gradient that later chunks hand down */
    vec *A = scratch, *carry = A + TILES * states, *dA = carry + TILES * states;
    /* [state][step]; dB and dC: not summed over lanes yet; h: [state][1 + step], from the state before the chunk on */
    vec *decay = dA + TILES * states, *dB = decay + CHUNK * states, *dC = dB + CHUNK * states, *h = dC + CHUNK * states;
    vec dD[TILES], dbias[TILES], dy[CHUNK];
    vec gB[CHUNK], gA[CHUNK]; /* sum_n g B; sum_n A exp(dt A) g h[s-1], which reaches dt through the decay */
    Chunk chunk;

    memset(carry, 0, 2 * TILES * states * sizeof(vec));
    memset(dD, 0, sizeof dD);
    memset(dbias, 0, sizeof dbias);
    for (int64_t at = 0; at < task.width; at += LANES) {
        const int64_t channel = task.channel + at, tile = at / LANES * states;
        const int lanes = filled(&task, at);
        load_states(A + tile, 1, scan->A + channel * states, lanes, states);
        if (grad->last)
            load_states(carry + tile, 1, grad->last + (task.sample * channels + channel) * states, lanes, states);
    }

    for (int64_t first = (chunks - 1) * CHUNK; first >= 0; first -= CHUNK) {
        const int steps = scan->length - first < CHUNK ? scan->length - first : CHUNK;
        const float *checkpoint = grad->checkpoints + (first / CHUNK * scan->batch + task.sample) * channels * states;
        memset(dB, 0, 2 * CHUNK * states * sizeof(vec));
        for (int64_t at = 0; at < task.width; at += LANES) {
            const int64_t channel = task.channel + at, tile = at / LANES * states;
            const int lanes = filled(&task, at);
            const vec skip = scan->D ? load(scan->D + channel, lanes) : splat(0.0f);

            /* the states again */
            load_chunk(&chunk, scan, &task, first, steps, channel, lanes);
            load_states(h, CHUNK + 1, checkpoint + channel * states, lanes, states);
            for (int64_t n = 0; n < states; n++) {
                const vec a = A[tile + n];
                vec *hn = h + n * (CHUNK + 1), *decay_n = decay + n * CHUNK, x = hn[0];
                for (int s = 0; s < steps; s++) {
                    decay_n[s] = exponential(chunk.dt[s] * a);
                    hn[s + 1] = x = decay_n[s] * x + chunk.input[s] * chunk.B[s][n];
                    chunk.y[s] += x * chunk.C[s][n];
                }
            }

            /* through the gate and the skip */
            for (int s = 0; s < steps; s++) {
                const int64_t offset = row(scan, task.sample, first + s) * channels + channel;
                dy[s] = load(grad->y + offset, lanes);
                if (scan->z) {
                    const vec z = load(scan->z + offset, lanes), open = sigmoid(z);
                    store(grad->z + offset, dy[s] * chunk.y[s] * open * (1.0f + z * (1.0f - open)), lanes);
                    dy[s] *= z * open;
                }
                dD[at / LANES] += dy[s] * chunk.u[s];
                gB[s] = gA[s] = splat(0.0f);
            }

            /* through the states */
            for (int64_t n = 0; n < states; n++) {
                const vec a = A[tile + n], *hn = h + n * (CHUNK + 1), *decay_n = decay + n * CHUNK;
                vec g = carry[tile + n], sum = dA[tile + n];
                for (int s = steps - 1; s >= 0; s--) {
                    g += dy[s] * chunk.C[s][n];
                    dC[n * CHUNK + s] += dy[s] * hn[s + 1];
                    dB[n * CHUNK + s] += g * chunk.input[s];
                    gB[s] += g * chunk.B[s][n];
                    g *= decay_n[s];
                    gA[s] += g * hn[s] * a;
                    sum += g * hn[s] * chunk.dt[s];
                }
                carry[tile + n] = g;
                dA[tile + n] = sum;
            }

            /* to what came in */
            for (int s = 0; s < steps; s++) {
                const int64_t offset = row(scan, task.sample, first + s) * channels + channel;
                vec ddelta = chunk.u[s] * gB[s] + gA[s];
                if (scan->softplus) ddelta *= sigmoid(chunk.raw[s]);
                dbias[at / LANES] += ddelta;
                store(grad->delta + offset, ddelta, lanes);
                store(grad->u + offset, skip * dy[s] + chunk.dt[s] * gB[s], lanes);
            }
        }
        for (int s = 0; s < steps; s++) {
            const int64_t r = task.block * scan->batch * scan->length + row(scan, task.sample, first + s);
            for (int64_t n = 0; n < states; n++) {
                grad->B[(r * scan->groups + task.group) * states + n] = lane_sum(dB[n * CHUNK + s]);
                grad->C[(r * scan->groups + task.group) * states + n] = lane_sum(dC[n * CHUNK + s]);
            }
        }
    }

    for (int64_t at = 0; at < task.width; at += LANES) {
        const int64_t channel = task.sample * channels + task.channel + at;
        store_states(grad->A + channel * states, dA + at / LANES * states, filled(&task, at), states);
        store(grad->D + channel, dD[at / LANES], filled(&task, at));
        store(grad->bias + channel, dbias[at / LANES], filled(&task, at));
    }
}

/* ---- called from Python; scratch: (threads, scan_scratch_floats), aligned to a vector */

int64_t scan_blocks(const Scan *scan) { return blocks(scan); }

int64_t scan_scratch_floats(int64_t states) { return LANES * states * (3 * TILES + 4 * CHUNK + 1); }

void scan_forward(const Scan *scan, int threads, float *scratch, float *y, float *last, float *checkpoints) {
    const int64_t tasks = scan->batch * scan->groups * blocks(scan), floats = scan_scratch_floats(scan->states);
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t i = thread; i < tasks; i += threads)
            forward_task(scan, nth_task(scan, i), (vec *)(scratch + thread * floats), y, last, checkpoints);
}

void scan_backward(const Scan *scan, int threads, float *scratch, const Gradients *grad) {
    const int64_t tasks = scan->batch * scan->groups * blocks(scan), floats = scan_scratch_floats(scan->states);
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t i = thread; i < tasks; i += threads)
            backward_task(scan, nth_task(scan, i), (vec *)(scratch + thread * floats), grad);
}
