/* Attention of single queries over paged entries, fp32: see DecodeAttention in attention.py. */
#include <math.h>
#include <stdint.h>

/* Scores are kept in `work`: a line of `longest` floats for each query and head. */
void paged_attention(
    const float *q, const float *k, const float *v, const int32_t *table, const int32_t *row,
    const int32_t *seen, float *out, float *work, int64_t queries, int64_t heads, int64_t kv_heads,
    int64_t dim, int64_t table_width, int64_t longest, int threads)
{
    const int64_t group = heads / kv_heads, entry = kv_heads * dim;
    const float scale = 1.0f / sqrtf((float)dim);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < queries * kv_heads; task++) {
        const int64_t m = task / kv_heads, g = task % kv_heads;
        const int32_t *places = table + (int64_t)row[m] * table_width;
        const int64_t n = seen[m];
        float *scores = work + task * group * longest;
        const float *query = q + (m * heads + g * group) * dim;
        float *result = out + (m * heads + g * group) * dim;
        for (int64_t j = 0; j < n; j++) {
            const float *key = k + places[j] * entry + g * dim;
            for (int64_t h = 0; h < group; h++) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < dim; d++)
                    sum += query[h * dim + d] * key[d];
                scores[h * longest + j] = sum * scale;
            }
        }
        for (int64_t h = 0; h < group; h++) {
            float *line = scores + h * longest, top = line[0], total = 0.0f;
            for (int64_t j = 1; j < n; j++)
                top = line[j] > top ? line[j] : top;
            for (int64_t j = 0; j < n; j++) {
                line[j] = expf(line[j] - top);
                total += line[j];
            }
            for (int64_t j = 0; j < n; j++)
                line[j] /= total;
            for (int64_t d = 0; d < dim; d++)
                result[h * dim + d] = 0.0f;
        }
        for (int64_t j = 0; j < n; j++) {
            const float *value = v + places[j] * entry + g * dim;
            for (int64_t h = 0; h < group; h++) {
                const float weight = scores[h * longest + j];
                float *sum = result + h * dim;
#pragma omp simd
                for (int64_t d = 0; d < dim; d++)
                    sum[d] += weight * value[d];
            }
        }
    }
}
