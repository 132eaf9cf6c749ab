package uverbstest

import (
	"encoding/binary"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Objects are what a kernel has made and not destroyed, by handle. The kernel that embeds them guards them by a lock of its own.
type Objects struct {
	Live    map[uint32]string // handle -> kind
	Cookies map[uint32]uint64 // handle -> user_handle
	Async   [2]int            // a pipe: the reading end is the provider's
	Mapped  int               // mappings that are there
	Dead    bool              // everything that is destroyed has gone with the device already

	t    testing.TB
	last uint32
}

// Init makes the account of a test, at the end of which everything must have been destroyed and unmapped. A cleanup that closes
// the context is to be added after it, so that it runs before.
func (o *Objects) Init(t testing.TB) {
	t.Helper()
	o.t, o.Live, o.Cookies = t, map[uint32]string{}, map[uint32]uint64{}
	if err := unix.Pipe2(o.Async[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(o.Async[1])
		if len(o.Live) > 0 || o.Mapped > 0 {
			t.Errorf("left over: %v, and %d mappings", o.Live, o.Mapped)
		}
	})
}

// Handle makes an object.
func (o *Objects) Handle(kind string) uint32 {
	o.last++
	o.Live[o.last] = kind
	return o.last
}

// Destroy ends an object, which must be of that kind.
func (o *Objects) Destroy(h uint32, kind string) syscall.Errno {
	if o.Live[h] != kind {
		o.t.Errorf("%s %d is destroyed, which is %q", kind, h, o.Live[h])
		return unix.EINVAL
	}
	delete(o.Live, h)
	if o.Dead {
		return unix.EIO
	}
	return 0
}

// Event raises an asynchronous event of an object.
func (o *Objects) Event(h uint32, typ ib.EventType) {
	var b [16]byte // struct ib_uverbs_async_event_desc
	binary.NativeEndian.PutUint64(b[0:], o.Cookies[h])
	binary.NativeEndian.PutUint32(b[8:], uint32(typ))
	if _, err := unix.Write(o.Async[1], b[:]); err != nil {
		o.t.Error(err)
	}
}
