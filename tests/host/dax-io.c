// dax-io FILE DISK: writes the first half of FILE to the beginning of DISK and reads it back into the second half,
// around the page cache and directly from and to the pages by which the file is mapped.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(const char *what) { perror(what); return 1; }

int main(int argc, char **argv) {
    struct stat st;
    int file = open(argv[1], O_RDWR), disk = open(argv[2], O_RDWR | O_DIRECT);
    if (argc != 3 || file < 0 || disk < 0 || fstat(file, &st)) return fail("open");
    size_t half = st.st_size / 2;
    char *map = mmap(0, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return fail("mmap");
    if (pwrite(disk, map, half, 0) != (ssize_t)half) return fail("write");
    if (pread(disk, map + half, half, 0) != (ssize_t)half) return fail("read");
    if (memcmp(map, map + half, half)) return fprintf(stderr, "what came back is not the same\n"), 1;
    if (msync(map, st.st_size, MS_SYNC)) return fail("msync");
    puts("dax-io: the same");
    return 0;
}
