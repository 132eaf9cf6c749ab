package seccomp

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Rule says which calls are not the kernel's to answer. Of rules for the same call, the first that matches counts.
type Rule struct {
	Call  int           // the number, unix.SYS_*
	Where []Arg         // all must hold; none: every such call
	Errno syscall.Errno // the call fails so; 0: the supervisor is asked
}

// An Arg is a condition on the lower 32 bits of an argument, which is what the kernel looks at in an int.
type Arg struct {
	Index int // 0 to 5
	Value uint32
}

// Offsets in struct seccomp_data, for the byte order of both architectures.
const (
	dataCall = 0
	dataArch = 4
	dataArgs = 16
)

// compile makes a filter of rules: calls of the own architecture that a rule names; all others pass.
func compile(arch uint32, rules []Rule) ([]unix.SockFilter, error) {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	f := []unix.SockFilter{
		{Code: load, K: dataArch},
		{Code: equal, K: arch, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW}, // 32-bit programs: not emulated
		{Code: load, K: dataCall},
	}
	for _, r := range rules {
		// Not this call: behind the rule. Every condition is two instructions; then the answer, and the number is loaded anew for
		// the next rule where conditions have replaced it.
		n := len(r.Where)
		if n > 6 {
			return nil, fmt.Errorf("a system call has 6 arguments, not %d", n)
		}
		body := 2*n + 1
		if n > 0 {
			body++ // the load of the number
		}
		f = append(f, unix.SockFilter{Code: equal, K: uint32(r.Call), Jf: uint8(body)})
		for i, a := range r.Where {
			if a.Index < 0 || a.Index > 5 {
				return nil, fmt.Errorf("a system call has no argument %d", a.Index)
			}
			f = append(f, unix.SockFilter{Code: load, K: dataArgs + 8*uint32(a.Index)},
				unix.SockFilter{Code: equal, K: a.Value, Jf: uint8(2*(n-i-1) + 1)})
		}
		answer := uint32(unix.SECCOMP_RET_USER_NOTIF)
		if r.Errno != 0 {
			answer = unix.SECCOMP_RET_ERRNO | uint32(r.Errno)&unix.SECCOMP_RET_DATA
		}
		f = append(f, unix.SockFilter{Code: ret, K: answer})
		if n > 0 {
			f = append(f, unix.SockFilter{Code: load, K: dataCall})
		}
	}
	f = append(f, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
	if len(f) > 4096 {
		return nil, fmt.Errorf("%d rules are more than a filter has room for", len(rules))
	}
	return f, nil
}
