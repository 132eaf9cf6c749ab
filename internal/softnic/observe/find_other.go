//go:build !linux

package observe

import (
	"context"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

var errLinux = fmt.Errorf("observing software NICs from other processes: %w on this system, only on Linux", errors.ErrUnsupported)

// GIDs would return the NICs of this host.
func GIDs() ([]ib.GID, error) { return nil, errLinux }

// ReadNIC would return the counters of a NIC.
func ReadNIC(context.Context, ib.GID) (*NIC, error) { return nil, errLinux }

// A Source would be a NIC that is being captured.
type Source struct {
	GID     ib.GID
	PID     int
	Program string
}

// Attach would begin to capture a NIC.
func Attach(context.Context, ib.GID, int, int) (*Source, error) { return nil, errLinux }

// Next would read the next packet.
func (s *Source) Next(*Record) (bool, error) { return false, errLinux }

// Lost would count packets.
func (s *Source) Lost() uint64 { return 0 }

// Ended would report whether the NIC has ended.
func (s *Source) Ended() bool { return true }

// Close would end the capture.
func (s *Source) Close() {}

// A Listener would be where NICs call.
type Listener struct{ Name string }

// Listen would open a Listener.
func Listen() (*Listener, error) { return nil, errLinux }

// Accept would wait for a NIC.
func (l *Listener) Accept(int, int) (*Source, error) { return nil, errLinux }

// Close would end the Listener.
func (l *Listener) Close() error { return nil }
