// kexec KERNEL INITRD CMDLINE: starts another kernel from this one without an orderly shutdown, so its devices are
// still busy.

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: kexec KERNEL INITRD CMDLINE\n"), 2;
    int kernel = open(argv[1], O_RDONLY), initrd = open(argv[2], O_RDONLY);
    if (kernel < 0 || initrd < 0) return perror("kexec: open"), 1;
    if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[3]) + 1, argv[3], 0)) return perror("kexec: load"), 1;
    reboot(LINUX_REBOOT_CMD_KEXEC);
    return perror("kexec: start"), 1;
}
