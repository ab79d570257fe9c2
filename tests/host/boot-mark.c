/* Writes the byte 123 to I/O port 0x607, where vireo's boot timer listens; elsewhere nothing does. This is a program
 * because Debian's cloud kernel lacks /dev/port. It has no libc, so that it costs a boot next to nothing. */

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    if (call(173 /* ioperm */, 0x607, 1, 1) == 0)
        __asm__ volatile("outb %b0, %w1" : : "a"(123), "d"(0x607));
    for (;;)
        call(60 /* exit */, 0, 0, 0);
}
