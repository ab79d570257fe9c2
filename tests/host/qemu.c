/* qemu-system-x86_64: starts the QEMU that setup unpacked into ../qemu, with its own libraries and firmware, since those of
 * this system may be older or another distribution's. ../qemu/qemu-system-x86_64 is the loader that came with them, by a
 * name that lists of processes show. Installed as target/host/bin/qemu-system-x86_64. A program rather than a script, so
 * that benchmarks do not count a shell. */

#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char root[PATH_MAX];

static char *below(const char *path)
{
    size_t size = strlen(root) + strlen(path) + 1;
    char *full = malloc(size);
    if (!full)
        exit(125);
    snprintf(full, size, "%s%s", root, path);
    return full;
}

int main(int argc, char **argv)
{
    char self[PATH_MAX] = "", **all = calloc(argc + 12, sizeof *all);
    if (!all || readlink("/proc/self/exe", self, sizeof self - 1) < 0) {
        perror("qemu-system-x86_64: /proc/self/exe");
        return 125;
    }
    snprintf(root, sizeof root, "%s/qemu", dirname(dirname(self)));
    char *first[] = {
        "qemu-system-x86_64", "--argv0", "qemu-system-x86_64",
        "--library-path", below("/usr/lib/x86_64-linux-gnu"), below("/usr/bin/qemu-system-x86_64"),
        "-L", below("/usr/share/qemu"), "-L", below("/usr/share/seabios"),
    };
    size_t count = sizeof first / sizeof *first;
    memcpy(all, first, sizeof first);
    memcpy(all + count, argv + 1, (argc > 0 ? argc - 1 : 0) * sizeof *argv);
    /* QEMU searches this before the system's directory, whose modules may belong to another version of QEMU. */
    setenv("QEMU_MODULE_DIR", below("/usr/lib/x86_64-linux-gnu/qemu"), 1);
    unsetenv("LD_LIBRARY_PATH");
    unsetenv("LD_PRELOAD");
    char *loader = below("/qemu-system-x86_64");
    execv(loader, all);
    perror(loader);
    return 125;
}
