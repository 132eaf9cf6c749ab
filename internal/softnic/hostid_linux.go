package softnic

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/ringside-rdma/ringside/internal/softnic/unixmsg"
)

// identity is this process's part of a hello.
var identity = sync.OnceValue(func() hello {
	h := hello{uid: uint32(os.Geteuid()), pid: uint32(os.Getpid()), pidNS: nsInode("pid"), mntNS: nsInode("mnt")}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		if id, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")); err == nil {
			copy(h.boot[:], id)
		}
	}
	return h
})

// nsInode returns the number of a namespace of this process, from a link such as "pid:[4026531836]"; 0 if it cannot be read.
func nsInode(kind string) uint64 {
	s, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		return 0
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, kind+":["), "]")
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}

// checkPeer says why a process cannot be served through shared memory. The kernel vouches for the uid, and for the process
// being visible in our PID namespace; the rest is the peer's own word, and only serves to find mistakes.
func checkPeer(c *net.UnixConn, h *hello) error {
	me := identity()
	cred, err := unixmsg.PeerCred(c)
	if err != nil {
		return err
	}
	switch {
	case checkUser(cred.Uid) != nil:
		return checkUser(cred.Uid)
	case h.boot != me.boot:
		return errors.New("the processes run under different kernels")
	case h.pidNS != me.pidNS || cred.Pid == 0:
		return errors.New("the processes run in different containers (PID namespaces), which do not share memory")
	case h.mntNS != me.mntNS:
		return errors.New("the processes run in different mount namespaces, which do not share memory")
	}
	return nil
}

// checkUser says why a process of that uid cannot be served.
func checkUser(uid uint32) error {
	if me := identity().uid; uid != me {
		return fmt.Errorf("processes of uid %d and uid %d do not share memory: run both as one user", uid, me)
	}
	return nil
}

// fromHere reports whether the other end of c is in this process.
func fromHere(c *net.UnixConn) bool {
	cred, err := unixmsg.PeerCred(c)
	return err == nil && int(cred.Pid) == os.Getpid()
}
