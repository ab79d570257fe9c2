/* avx SEED [ROUNDS]: keeps values that depend on SEED in all 16 YMM registers and checks in each round that they are
 * still there; prints a line for each round. SIGUSR1 ends it, and so does a register that changed, with status 1. */

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REGISTERS 16
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#define LOAD(N) "vmovdqu " #N "*32(%1), %%ymm" #N "\n"
#define STORE(N) "vmovdqu %%ymm" #N ", " #N "*32(%2)\n"

struct registers {
    uint64_t lanes[REGISTERS][4];
};

static volatile sig_atomic_t asked_to_end;

static void end(int signal)
{
    (void)signal;
    asked_to_end = 1;
}

/* Nothing but this loop runs in this program between the first load and the last store. */
static void hold(const struct registers *values, struct registers *kept, uint64_t turns)
{
    __asm__ volatile(EACH(LOAD) "1: dec %0\njnz 1b\n" EACH(STORE) "vzeroupper\n"
                     : "+r"(turns)
                     : "r"(values), "r"(kept)
                     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                       "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

int main(int argc, char **argv)
{
    struct registers values, kept;
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    unsigned rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : -1u;
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGUSR1, end);
    for (int reg = 0; reg < REGISTERS; reg++)
        for (int lane = 0; lane < 4; lane++)
            values.lanes[reg][lane] = seed * 0x9E3779B97F4A7C15 + reg * 0x100000001 + lane * 0x1000000010000;
    for (unsigned round = 1; round <= rounds && !asked_to_end; round++) {
        memset(&kept, 0, sizeof kept);
        hold(&values, &kept, 30000000);
        for (int reg = 0; reg < REGISTERS; reg++) {
            if (memcmp(values.lanes[reg], kept.lanes[reg], sizeof kept.lanes[reg])) {
                printf("avx %llu: ymm%d changed in round %u\n", (unsigned long long)seed, reg, round);
                return 1;
            }
        }
        printf("avx %llu: round %u\n", (unsigned long long)seed, round);
    }
    printf("avx %llu: kept\n", (unsigned long long)seed);
    return 0;
}
