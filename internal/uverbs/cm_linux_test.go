package uverbs

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/rdmacm"
)

// Another port is tried where the kernel's choice was one that TCP cannot use, and nowhere else.
func TestPortRetry(t *testing.T) {
	taken := &rdmacm.OpError{Op: "connect", Err: unix.EADDRNOTAVAIL}
	for what, c := range map[string]struct {
		port  uint16
		errs  []error // of the calls
		calls int
	}{
		"at once":            {errs: []error{nil}, calls: 1},
		"the third":          {errs: []error{taken, &rdmacm.OpError{Op: "connect", Err: unix.EADDRINUSE}, nil}, calls: 3},
		"none":               {errs: []error{taken}, calls: maxPortTries},
		"a listener's":       {errs: []error{&rdmacm.OpError{Op: "listen", Err: unix.EADDRINUSE}, nil}, calls: 2},
		"one asked for":      {port: 1, errs: []error{taken}, calls: 1},
		"not our address":    {errs: []error{&rdmacm.OpError{Op: "resolve_addr", Err: unix.EADDRNOTAVAIL}}, calls: 1},
		"refused":            {errs: []error{taken, &rdmacm.OpError{Op: "connect", Err: unix.ECONNREFUSED}}, calls: 2},
		"of a connection":    {errs: []error{&rdmacm.OpError{Op: "connect", Err: &rdmacm.RejectedError{Errno: unix.EADDRNOTAVAIL}}}, calls: 1},
		"not of the manager": {errs: []error{unix.EADDRINUSE}, calls: 1},
	} {
		calls := 0
		var last error
		err := portRetry(c.port, func() error {
			last = c.errs[min(calls, len(c.errs)-1)]
			calls++
			return last
		})
		if calls != c.calls || !errors.Is(err, last) {
			t.Errorf("%s: %d calls, %v", what, calls, err)
		}
	}
}

// A context takes only what is for its device, by whatever the connection manager says of that.
func TestTakes(t *testing.T) {
	index := uint32(5)
	c := &Context{File: &File{device: "mlx5_0"}, index: &index, guid: 7}
	for _, x := range []struct {
		a    rdmacm.Addr
		want bool
	}{
		{rdmacm.Addr{}, true},
		{rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 5, NodeGUID: 9}, true},
		{rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 6, NodeGUID: 7}, false},
		{rdmacm.Addr{Bound: true, NodeGUID: 7}, true},
		{rdmacm.Addr{Bound: true, NodeGUID: 9}, false},
	} {
		if err := c.takes(&x.a); (err == nil) != x.want {
			t.Errorf("%+v: %v", x.a, err)
		}
	}
	if err := (&Context{}).takes(&rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 5}); err != nil {
		t.Error(err)
	}
}
