/* A stream in C, without a library:

     emx-onnx-cgen compile c.onnx model.c --model-name model --large-weight-threshold 0 --large-temp-threshold 0
     gcc -O3 -march=native -ffast-math -fno-finite-math-only -D__FAST_MATH__ in_c.c model.c -o stream -lm
     ./stream FOLDER

   Without --large-weight-threshold 0 weights of more than 100 kB lie in a file that model_load has to be given first; without that call
   they are 0, and there is no error. */
#include <stdio.h>
#include <string.h>

void model(const float x[1][16], const float h_0[1][1][32], const float c_0[1][1][32], float y[1][32], float h_n[1][1][32],
           float c_n[1][1][32]);

static FILE *opened(const char *folder, const char *name, const char *how) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return fopen(path, how);
}

int main(int count, char **words) {
    static float x[1][16], y[1][32], h[2][1][1][32], c[2][1][1][32]; /* states before and after a step; they start from 0 */
    FILE *steps = count == 2 ? opened(words[1], "x.bin", "rb") : NULL;
    FILE *results = count == 2 ? opened(words[1], "y.bin", "wb") : NULL;
    if (!steps || !results) return 1;
    for (int now = 0; fread(x, sizeof x, 1, steps) == 1; now = 1 - now) {
        model(x, h[now], c[now], y, h[1 - now], c[1 - now]);
        fwrite(y, sizeof y, 1, results);
    }
    fclose(steps);
    return fclose(results);
}
