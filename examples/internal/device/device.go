// Package device opens what an example works with: a device and a poller on it.
package device

import (
	"errors"
	"flag"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
)

// Options say which device to open and how to wait on it. The zero value is the best device, polled adaptively.
type Options struct {
	Name string             // empty: verbs.Open decides
	Mode transport.PollMode // how its poller waits
}

// Flags adds -device and -poll.
func (o *Options) Flags(fs *flag.FlagSet) {
	fs.StringVar(&o.Name, "device", "", "device to use; empty: the best one, or what RINGSIDE_DEVICE says")
	fs.Func("poll", "how to wait: adaptive, busy or event (default adaptive)", func(s string) (err error) {
		o.Mode, err = transport.ParsePollMode(s)
		return err
	})
}

// Args are the flags that give a child process the same options.
func (o *Options) Args() []string { return []string{"-device", o.Name, "-poll", o.Mode.String()} }

// A Device is a device with one poller, which drives all connections that are made with it. A program that registers
// memory in the poller's protection domain wants one of its own: it is there before the first connection, and after the
// last.
type Device struct {
	*transport.Poller
	vctx *verbs.Context
}

// Open opens a device and makes a poller.
func (o *Options) Open() (*Device, error) {
	vctx, err := verbs.Open(o.Name)
	if err != nil {
		return nil, err
	}
	p, err := transport.NewPoller(vctx, &transport.PollerConfig{Mode: o.Mode})
	if err != nil {
		return nil, errors.Join(err, vctx.Close())
	}
	return &Device{p, vctx}, nil
}

// Config is a transport configuration with the device's poller.
func (d *Device) Config(name string) *transport.Config {
	return &transport.Config{Poller: d.Poller, Name: name}
}

// Close gives both back. Connections, listeners and memory have to be closed before.
func (d *Device) Close() error { return errors.Join(d.Poller.Close(), d.vctx.Close()) }
