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
	Last  uint32 // if it is more than Value: from Value to this one
}

// length is how many instructions a condition takes.
func (a Arg) length() int {
	if a.Last > a.Value {
		return 3
	}
	return 2
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
		least = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		more  = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	f := []unix.SockFilter{
		{Code: load, K: dataArch},
		{Code: equal, K: arch, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW}, // 32-bit programs: not emulated
		{Code: load, K: dataCall},
	}
	for _, r := range rules {
		// Not this call: behind the rule. The conditions; then the answer, and the number is loaded anew for the next rule where
		// conditions have replaced it.
		n := len(r.Where)
		if n > 6 {
			return nil, fmt.Errorf("a system call has 6 arguments, not %d", n)
		}
		left := 0 // instructions of conditions
		for _, a := range r.Where {
			left += a.length()
		}
		body := left + 1
		if n > 0 {
			body++ // the load of the number
		}
		f = append(f, unix.SockFilter{Code: equal, K: uint32(r.Call), Jf: uint8(body)})
		for _, a := range r.Where {
			if a.Index < 0 || a.Index > 5 {
				return nil, fmt.Errorf("a system call has no argument %d", a.Index)
			}
			left -= a.length()
			otherwise := uint8(left + 1) // behind the other conditions and the answer
			f = append(f, unix.SockFilter{Code: load, K: dataArgs + 8*uint32(a.Index)})
			if a.Last > a.Value {
				f = append(f, unix.SockFilter{Code: least, K: a.Value, Jf: otherwise + 1},
					unix.SockFilter{Code: more, K: a.Last, Jt: otherwise})
			} else {
				f = append(f, unix.SockFilter{Code: equal, K: a.Value, Jf: otherwise})
			}
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
